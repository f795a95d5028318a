"""Which items of MIMIC-IV are which canonical series: by itemid, never by label.

HAIM matches by label, so its "Glucose" also takes blood gas and urine, its "Hemoglobin" the blood
gas; the items here are the blood ones. HAIM's 9 chart, 22 laboratory and 10 procedure series are
the first of each kind.
"""

from __future__ import annotations

from typing import NamedTuple


class Item(NamedTuple):
    """An item of `d_items` or `d_labitems`, and the canonical series that it measures.

    `unit` is that of values which come without one, where it is not the series' own.
    """

    itemid: int
    source: str
    series: str
    label: str
    unit: str | None = None


ITEMS = (
    Item(220045, "chart", "heart_rate", "Heart Rate"),
    Item(220179, "chart", "sbp_noninvasive", "Non Invasive Blood Pressure systolic"),
    Item(220180, "chart", "dbp_noninvasive", "Non Invasive Blood Pressure diastolic"),
    Item(220181, "chart", "mbp_noninvasive", "Non Invasive Blood Pressure mean"),
    Item(220210, "chart", "respiratory_rate", "Respiratory Rate"),
    Item(220277, "chart", "spo2", "O2 saturation pulseoxymetry"),
    Item(223900, "chart", "gcs_verbal", "GCS - Verbal Response"),
    Item(220739, "chart", "gcs_eye", "GCS - Eye Opening"),
    Item(223901, "chart", "gcs_motor", "GCS - Motor Response"),
    Item(220050, "chart", "sbp_invasive", "Arterial Blood Pressure systolic"),
    Item(220051, "chart", "dbp_invasive", "Arterial Blood Pressure diastolic"),
    Item(220052, "chart", "mbp_invasive", "Arterial Blood Pressure mean"),
    Item(223762, "chart", "temperature", "Temperature Celsius"),
    Item(223761, "chart", "temperature", "Temperature Fahrenheit", "deg F"),
    Item(223835, "chart", "fio2", "Inspired O2 Fraction"),
    Item(223834, "chart", "oxygen_flow", "O2 Flow"),
    Item(220339, "chart", "peep", "PEEP set"),
    Item(224688, "chart", "vent_rate_set", "Respiratory Rate (Set)"),
    Item(224684, "chart", "tidal_volume_set", "Tidal Volume (set)"),
    Item(224697, "chart", "mean_airway_pressure", "Mean Airway Pressure"),
    Item(224695, "chart", "peak_inspiratory_pressure", "Peak Insp. Pressure"),
    Item(224696, "chart", "plateau_pressure", "Plateau Pressure"),
    Item(224701, "chart", "pressure_support", "PSV Level"),
    Item(224639, "chart", "weight", "Daily Weight"),
    Item(50931, "lab", "glucose", "Glucose"),
    Item(50971, "lab", "potassium", "Potassium"),
    Item(50983, "lab", "sodium", "Sodium"),
    Item(50902, "lab", "chloride", "Chloride"),
    Item(50912, "lab", "creatinine", "Creatinine"),
    Item(51006, "lab", "urea_nitrogen", "Urea Nitrogen"),
    Item(50882, "lab", "bicarbonate", "Bicarbonate"),
    Item(50868, "lab", "anion_gap", "Anion Gap"),
    Item(51222, "lab", "hemoglobin", "Hemoglobin"),
    Item(51221, "lab", "hematocrit", "Hematocrit"),
    Item(50960, "lab", "magnesium", "Magnesium"),
    Item(51265, "lab", "platelet_count", "Platelet Count"),
    Item(50970, "lab", "phosphate", "Phosphate"),
    Item(51301, "lab", "white_blood_cells", "White Blood Cells"),
    Item(50893, "lab", "calcium_total", "Calcium, Total"),
    Item(51248, "lab", "mch", "MCH"),
    Item(51279, "lab", "red_blood_cells", "Red Blood Cells"),
    Item(51249, "lab", "mchc", "MCHC"),
    Item(51250, "lab", "mcv", "MCV"),
    Item(51277, "lab", "rdw", "RDW"),
    Item(51256, "lab", "neutrophils", "Neutrophils"),
    Item(51009, "lab", "vancomycin", "Vancomycin"),
    Item(52075, "lab", "neutrophils_abs", "Absolute Neutrophil Count"),
    Item(51133, "lab", "lymphocytes_abs", "Absolute Lymphocyte Count"),
    Item(50889, "lab", "c_reactive_protein", "C-Reactive Protein"),
    Item(50954, "lab", "ldh", "Lactate Dehydrogenase (LD)"),
    Item(50915, "lab", "d_dimer", "D-Dimer", "ng/mL"),
    Item(51211, "lab", "factor_xiii", "Factor XIII"),
    Item(50821, "lab", "po2", "pO2"),
    Item(50818, "lab", "pco2", "pCO2"),
    Item(50820, "lab", "ph", "pH"),
    Item(50813, "lab", "lactate", "Lactate"),
    Item(50862, "lab", "albumin", "Albumin"),
    Item(50885, "lab", "bilirubin_total", "Bilirubin, Total"),
    Item(50863, "lab", "alkaline_phosphatase", "Alkaline Phosphatase"),
    Item(50861, "lab", "alt", "Alanine Aminotransferase (ALT)"),
    Item(50878, "lab", "ast", "Asparate Aminotransferase (AST)"),
    Item(50907, "lab", "cholesterol", "Cholesterol, Total"),
    Item(51002, "lab", "troponin_i", "Troponin I"),
    Item(51003, "lab", "troponin_t", "Troponin T"),
    Item(229351, "procedure", "foley_catheter", "Foley Catheter"),
    Item(224264, "procedure", "picc_line", "PICC Line"),
    Item(224385, "procedure", "intubation", "Intubation"),
    Item(225805, "procedure", "peritoneal_dialysis", "Peritoneal Dialysis"),
    Item(225400, "procedure", "bronchoscopy", "Bronchoscopy"),
    Item(221223, "procedure", "eeg", "EEG"),
    Item(225802, "procedure", "dialysis_crrt", "Dialysis - CRRT"),
    Item(224270, "procedure", "dialysis_catheter", "Dialysis Catheter"),
    Item(227712, "procedure", "chest_tube_removed", "Chest Tube Removed"),
    Item(225441, "procedure", "hemodialysis", "Hemodialysis"),
    Item(225792, "procedure", "mechanical_ventilation", "Invasive Ventilation"),
    Item(225794, "procedure", "noninvasive_ventilation", "Non-invasive Ventilation"),
    Item(227194, "procedure", "extubation", "Extubation"),
    Item(225459, "procedure", "chest_xray", "Chest X-Ray"),
)
