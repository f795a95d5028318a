"""What the synthetic clinical text talks about: quantities, conditions, and their vocabulary.

Written by hand for this repository. Reference ranges are the usual adult textbook ranges, rounded;
the effects of conditions are coarse directions ("kidney injury raises creatinine"), good enough to
give text an inner logic and nothing more: no figure here may inform care.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Quantity(NamedTuple):
    """A measurement with its adult reference range and the limits of what is ever written."""

    name: str
    unit: str
    low: float
    high: float
    decimals: int
    floor: float
    ceiling: float


VITALS = {
    q.name: q
    for q in (
        Quantity("heart rate", "bpm", 60, 100, 0, 28, 210),
        Quantity("respiratory rate", "breaths per minute", 12, 20, 0, 5, 55),
        Quantity("systolic blood pressure", "mmHg", 95, 140, 0, 45, 240),
        Quantity("diastolic blood pressure", "mmHg", 55, 90, 0, 25, 130),
        Quantity("temperature", "C", 36.1, 37.5, 1, 32.0, 41.5),
        Quantity("oxygen saturation", "%", 94, 100, 0, 60, 100),
        Quantity("Glasgow coma scale", "points", 14.5, 15.5, 0, 3, 15),
        Quantity("urine output", "mL/h", 40, 120, 0, 0, 400),
    )
}
LABS = {
    q.name: q
    for q in (
        Quantity("sodium", "mmol/L", 135, 145, 0, 105, 175),
        Quantity("potassium", "mmol/L", 3.5, 5.0, 1, 1.8, 8.5),
        Quantity("chloride", "mmol/L", 98, 107, 0, 75, 135),
        Quantity("bicarbonate", "mmol/L", 22, 29, 0, 4, 48),
        Quantity("urea nitrogen", "mg/dL", 7, 20, 0, 3, 180),
        Quantity("creatinine", "mg/dL", 0.6, 1.2, 1, 0.2, 14.0),
        Quantity("glucose", "mg/dL", 70, 140, 0, 25, 950),
        Quantity("calcium", "mg/dL", 8.5, 10.5, 1, 5.0, 15.0),
        Quantity("magnesium", "mg/dL", 1.7, 2.4, 1, 0.7, 6.0),
        Quantity("phosphate", "mg/dL", 2.5, 4.5, 1, 0.6, 12.0),
        Quantity("white blood cell count", "K/uL", 4.5, 11.0, 1, 0.2, 70.0),
        Quantity("hemoglobin", "g/dL", 12.0, 17.0, 1, 3.5, 20.0),
        Quantity("platelet count", "K/uL", 150, 400, 0, 6, 1100),
        Quantity("INR", "", 0.9, 1.2, 1, 0.8, 10.0),
        Quantity("total bilirubin", "mg/dL", 0.2, 1.2, 1, 0.1, 35.0),
        Quantity("alanine aminotransferase", "U/L", 7, 45, 0, 4, 6000),
        Quantity("aspartate aminotransferase", "U/L", 8, 40, 0, 5, 7000),
        Quantity("alkaline phosphatase", "U/L", 40, 130, 0, 20, 1500),
        Quantity("albumin", "g/dL", 3.5, 5.0, 1, 1.0, 5.8),
        Quantity("lactate", "mmol/L", 0.5, 2.0, 1, 0.3, 22.0),
        Quantity("troponin", "ng/mL", 0.00, 0.04, 2, 0.00, 40.0),
        Quantity("natriuretic peptide", "pg/mL", 5, 100, 0, 5, 5000),
        Quantity("C-reactive protein", "mg/L", 0, 8, 0, 0, 480),
        Quantity("lipase", "U/L", 10, 140, 0, 5, 8000),
        Quantity("arterial pH", "", 7.35, 7.45, 2, 6.80, 7.70),
        Quantity("carbon dioxide pressure", "mmHg", 35, 45, 0, 15, 120),
        Quantity("oxygen pressure", "mmHg", 75, 100, 0, 35, 450),
    )
}
QUANTITIES = VITALS | LABS

# What a chest film may show; a condition lists those it causes, the rest are denied or unsaid.
FINDINGS = {
    "fracture": ("displaced rib fracture", "healing rib fractures", "clavicle fracture"),
    "lung lesion": ("spiculated nodule", "rounded lung mass", "cavitating lesion"),
    "enlarged cardiomediastinum": ("widened mediastinum", "prominent aortic contour"),
    "consolidation": ("dense consolidation", "lobar consolidation with air bronchograms"),
    "pneumonia": ("airspace disease suspicious for pneumonia", "multifocal pneumonia"),
    "atelectasis": ("linear atelectasis", "volume loss in keeping with atelectasis"),
    "lung opacity": ("patchy opacity", "diffuse hazy opacities", "ground glass opacity"),
    "pneumothorax": ("apical pneumothorax", "large pneumothorax with collapsed lung"),
    "edema": ("interstitial pulmonary edema", "perihilar haze with vascular congestion"),
    "cardiomegaly": ("enlarged cardiac silhouette", "cardiomegaly"),
    "pleural effusion": ("layering pleural effusion", "blunted costophrenic angle"),
}
PLACES = ("right upper lobe", "left upper lobe", "right lower lobe", "left lower lobe",
          "right base", "left base", "both bases", "right middle lobe", "lingula")  # fmt: skip
DEVICES = ("endotracheal tube", "nasogastric tube", "central venous catheter", "chest tube",
           "pacemaker leads", "sternal wires", "dialysis catheter", "feeding tube")  # fmt: skip
CHRONIC = ("hypertension", "type 2 diabetes", "chronic kidney disease", "coronary artery disease",
           "chronic obstructive pulmonary disease", "atrial fibrillation", "dementia", "asthma",
           "obesity", "hypothyroidism", "depression", "breast cancer in remission", "epilepsy",
           "peripheral vascular disease", "rheumatoid arthritis", "sleep apnea", "gout",
           "osteoporosis", "prior stroke", "tobacco use", "alcohol use")  # fmt: skip
HOME_DRUGS = ("metformin 500 mg twice daily", "lisinopril 10 mg daily",
              "atorvastatin 40 mg nightly", "aspirin 81 mg daily", "amlodipine 5 mg daily",
              "levothyroxine 75 mcg daily", "metoprolol 25 mg twice daily",
              "omeprazole 20 mg daily", "apixaban 5 mg twice daily", "sertraline 50 mg daily",
              "allopurinol 100 mg daily", "gabapentin 300 mg nightly",
              "tamsulosin 0.4 mg nightly", "insulin glargine 18 units nightly")  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """A reason for admission.

    Attributes:
        complaints: How the patient puts it.
        effects: Quantity name to the factor on its value at full severity (< 1 lowers it).
        findings: Keys of `FINDINGS` that it causes on a chest film.
        drugs: Treatments, with dose and route.
        procedures: What is done to the patient.
        lethality: Log-odds of death at middle severity and age 65.
    """

    name: str
    complaints: tuple[str, ...]
    effects: dict[str, float]
    findings: tuple[str, ...]
    drugs: tuple[str, ...]
    procedures: tuple[str, ...]
    lethality: float


CONDITIONS = (
    Condition("acute kidney injury", ("poor urine output", "nausea and fatigue", "leg swelling"),
              {"creatinine": 4.5, "urea nitrogen": 4.0, "potassium": 1.4, "bicarbonate": 0.65,
               "phosphate": 1.8, "urine output": 0.15, "arterial pH": 0.975},
              ("edema",), ("sodium bicarbonate infusion", "calcium gluconate 1 g IV"),
              ("hemodialysis", "renal ultrasound", "dialysis catheter placement"), -2.2),
    Condition("septic shock", ("fever and confusion", "rigors", "weakness and low blood pressure"),
              {"lactate": 5.0, "white blood cell count": 2.6, "systolic blood pressure": 0.62,
               "diastolic blood pressure": 0.62, "heart rate": 1.55, "temperature": 1.055,
               "C-reactive protein": 30.0, "platelet count": 0.4, "creatinine": 2.4,
               "respiratory rate": 1.7, "bicarbonate": 0.7, "urine output": 0.3},
              ("lung opacity",),
              ("norepinephrine infusion", "vancomycin 1 g IV", "piperacillin-tazobactam 4.5 g IV"),
              ("central line placement", "arterial line placement", "blood cultures"), -0.8),
    Condition("pneumonia", ("cough and fever", "productive cough", "pleuritic pain"),
              {"white blood cell count": 2.1, "temperature": 1.05, "oxygen saturation": 0.86,
               "respiratory rate": 1.7, "C-reactive protein": 25.0, "heart rate": 1.3,
               "oxygen pressure": 0.65},
              ("pneumonia", "consolidation", "lung opacity"),
              ("ceftriaxone 1 g IV", "azithromycin 500 mg IV", "oxygen by mask"),
              ("sputum culture", "noninvasive ventilation", "bronchoscopy"), -2.3),
    Condition("acute heart failure", ("breathlessness at night", "leg swelling", "orthopnea"),
              {"natriuretic peptide": 16.0, "oxygen saturation": 0.88, "respiratory rate": 1.6,
               "heart rate": 1.25, "sodium": 0.93, "creatinine": 1.6, "troponin": 2.5},
              ("edema", "cardiomegaly", "pleural effusion"),
              ("furosemide 40 mg IV", "nitroglycerin infusion", "spironolactone 25 mg daily"),
              ("echocardiogram", "noninvasive ventilation", "right heart catheterization"), -2.4),
    Condition("exacerbation of chronic obstructive pulmonary disease",
              ("wheezing", "worsening breathlessness", "increased sputum"),
              {"carbon dioxide pressure": 1.8, "arterial pH": 0.975, "oxygen saturation": 0.87,
               "respiratory rate": 1.6, "bicarbonate": 1.25, "oxygen pressure": 0.68},
              ("atelectasis",),
              ("albuterol nebulizer", "methylprednisolone 60 mg IV", "ipratropium nebulizer"),
              ("noninvasive ventilation", "arterial blood gas"), -2.7),
    Condition("diabetic ketoacidosis", ("thirst and vomiting", "abdominal pain", "drowsiness"),
              {"glucose": 5.0, "bicarbonate": 0.4, "arterial pH": 0.96, "potassium": 1.25,
               "sodium": 0.94, "respiratory rate": 1.7, "carbon dioxide pressure": 0.6,
               "heart rate": 1.35},
              (), ("insulin infusion", "normal saline 1 L bolus", "potassium chloride 20 mmol IV"),
              ("hourly glucose checks", "arterial blood gas"), -3.8),
    Condition("gastrointestinal bleeding", ("black stools", "vomiting blood", "dizziness"),
              {"hemoglobin": 0.5, "urea nitrogen": 2.4, "heart rate": 1.4, "lactate": 2.2,
               "systolic blood pressure": 0.75, "INR": 1.5},
              (), ("pantoprazole infusion", "octreotide infusion", "vitamin K 10 mg IV"),
              ("upper endoscopy", "transfusion of red cells", "colonoscopy"), -2.5),
    Condition("acute myocardial infarction", ("crushing chest pain", "pain in the left arm"),
              {"troponin": 150.0, "natriuretic peptide": 5.0, "heart rate": 1.2,
               "glucose": 1.4, "systolic blood pressure": 0.85},
              ("edema", "cardiomegaly"),
              ("heparin infusion", "ticagrelor 90 mg twice daily", "aspirin 325 mg once"),
              ("coronary angiography", "stent placement", "echocardiogram"), -2.3),
    Condition("pulmonary embolism", ("sudden breathlessness", "sharp chest pain", "fainting"),
              {"oxygen saturation": 0.87, "heart rate": 1.45, "respiratory rate": 1.6,
               "troponin": 8.0, "carbon dioxide pressure": 0.75, "oxygen pressure": 0.65,
               "natriuretic peptide": 5.0},
              ("atelectasis", "pleural effusion"),
              ("heparin infusion", "alteplase 100 mg IV", "enoxaparin 80 mg twice daily"),
              ("computed tomography angiography", "echocardiogram"), -2.4),
    Condition("decompensated cirrhosis", ("jaundice", "swollen abdomen", "confusion at home"),
              {"total bilirubin": 12.0, "INR": 2.0, "albumin": 0.55, "platelet count": 0.3,
               "sodium": 0.9, "aspartate aminotransferase": 4.0, "alanine aminotransferase": 2.5,
               "alkaline phosphatase": 1.8, "Glasgow coma scale": 0.8},
              ("pleural effusion", "atelectasis"),
              ("lactulose 30 mL", "albumin 25 g IV", "rifaximin 550 mg twice daily"),
              ("paracentesis", "upper endoscopy", "abdominal ultrasound"), -1.6),
    Condition("ischemic stroke", ("weakness of one side", "slurred speech", "facial droop"),
              {"Glasgow coma scale": 0.7, "systolic blood pressure": 1.4, "glucose": 1.3,
               "diastolic blood pressure": 1.3},
              ("cardiomegaly",), ("alteplase 60 mg IV", "labetalol 10 mg IV", "clopidogrel 75 mg"),
              ("computed tomography of the head", "mechanical thrombectomy"), -2.2),
    Condition("intracranial hemorrhage", ("sudden severe headache", "found unresponsive"),
              {"Glasgow coma scale": 0.4, "systolic blood pressure": 1.5, "heart rate": 0.8,
               "sodium": 1.05, "glucose": 1.4},
              (), ("nicardipine infusion", "mannitol 50 g IV", "levetiracetam 1 g IV"),
              ("external ventricular drain", "craniotomy", "intubation"), -0.9),
    Condition("spontaneous pneumothorax", ("sudden chest pain", "breathlessness on exertion"),
              {"oxygen saturation": 0.9, "respiratory rate": 1.5, "heart rate": 1.25},
              ("pneumothorax", "atelectasis"), ("morphine 2 mg IV", "oxygen by nasal cannula"),
              ("chest tube placement", "needle decompression"), -3.6),
    Condition("acute pancreatitis", ("abdominal pain to the back", "vomiting", "bloating"),
              {"lipase": 20.0, "calcium": 0.8, "white blood cell count": 1.9, "glucose": 1.6,
               "C-reactive protein": 25.0, "heart rate": 1.3, "alanine aminotransferase": 3.0},
              ("pleural effusion", "atelectasis"),
              ("lactated Ringer infusion", "hydromorphone 0.5 mg IV"),
              ("computed tomography of the abdomen", "feeding tube placement"), -2.9),
    Condition("blunt chest trauma", ("pain after a fall", "motor vehicle collision"),
              {"hemoglobin": 0.7, "heart rate": 1.3, "oxygen saturation": 0.92, "lactate": 2.0,
               "respiratory rate": 1.4},
              ("fracture", "pneumothorax", "lung opacity", "enlarged cardiomediastinum"),
              ("ketorolac 15 mg IV", "fentanyl 50 mcg IV", "tetanus vaccine"),
              ("chest tube placement", "trauma survey", "nerve block"), -2.8),
    Condition("urinary tract infection", ("burning urination", "flank pain", "new confusion"),
              {"white blood cell count": 1.8, "temperature": 1.04, "C-reactive protein": 12.0,
               "creatinine": 1.4, "heart rate": 1.2},
              (), ("ceftriaxone 1 g IV", "nitrofurantoin 100 mg twice daily"),
              ("urine culture", "bladder catheter"), -3.9),
    Condition("atrial fibrillation with rapid response", ("palpitations", "lightheadedness"),
              {"heart rate": 1.8, "systolic blood pressure": 0.85, "natriuretic peptide": 4.0,
               "potassium": 0.85, "magnesium": 0.8},
              ("cardiomegaly",), ("diltiazem infusion", "amiodarone 150 mg IV"),
              ("cardioversion", "echocardiogram"), -3.7),
    Condition("opioid overdose", ("found unresponsive", "slow breathing"),
              {"respiratory rate": 0.45, "Glasgow coma scale": 0.4, "oxygen saturation": 0.84,
               "carbon dioxide pressure": 1.9, "arterial pH": 0.97},
              ("edema", "lung opacity"), ("naloxone 0.4 mg IV", "naloxone infusion"),
              ("intubation", "toxicology screen"), -2.9),
    Condition("hyponatremia", ("seizure", "headache and confusion", "unsteady gait"),
              {"sodium": 0.83, "Glasgow coma scale": 0.8, "chloride": 0.85, "urea nitrogen": 0.7},
              (), ("hypertonic saline 100 mL bolus", "fluid restriction", "lorazepam 2 mg IV"),
              ("sodium checks every 4 hours", "computed tomography of the head"), -3.3),
    Condition("low output after heart surgery", ("planned bypass surgery", "planned valve repair"),
              {"hemoglobin": 0.68, "platelet count": 0.6, "troponin": 20.0, "lactate": 1.9,
               "temperature": 0.97, "glucose": 1.4},
              ("atelectasis", "pleural effusion", "enlarged cardiomediastinum"),
              ("cefazolin 2 g IV", "milrinone infusion", "propofol infusion"),
              ("coronary artery bypass grafting", "valve replacement", "extubation"), -3.6),
    Condition("acute respiratory distress syndrome", ("severe breathlessness", "rapid breathing"),
              {"oxygen saturation": 0.78, "oxygen pressure": 0.55, "respiratory rate": 2.0,
               "heart rate": 1.4, "carbon dioxide pressure": 1.35, "lactate": 2.2,
               "white blood cell count": 1.7},
              ("lung opacity", "consolidation", "edema"),
              ("cisatracurium infusion", "dexamethasone 6 mg IV", "midazolam infusion"),
              ("intubation", "prone positioning", "tracheostomy"), -0.7),
    Condition("alcohol withdrawal", ("tremor and sweating", "hallucinations", "seizure"),
              {"heart rate": 1.45, "systolic blood pressure": 1.25, "magnesium": 0.65,
               "phosphate": 0.6, "potassium": 0.8, "aspartate aminotransferase": 4.0,
               "temperature": 1.02},
              ("lung opacity",), ("diazepam 10 mg IV", "thiamine 100 mg IV", "folic acid 1 mg"),
              ("withdrawal scoring", "electrocardiogram"), -3.9),
    Condition("hip fracture", ("hip pain after a fall", "unable to walk"),
              {"hemoglobin": 0.7, "heart rate": 1.15, "albumin": 0.8, "glucose": 1.2},
              ("atelectasis", "fracture"), ("acetaminophen 1 g", "enoxaparin 40 mg daily"),
              ("hip replacement", "physical therapy", "nerve block"), -3.0),
    Condition("lung cancer", ("coughing blood", "weight loss", "chronic cough"),
              {"calcium": 1.25, "sodium": 0.93, "hemoglobin": 0.75, "albumin": 0.7,
               "oxygen saturation": 0.93, "alkaline phosphatase": 2.0},
              ("lung lesion", "pleural effusion", "atelectasis", "enlarged cardiomediastinum"),
              ("morphine 5 mg", "zoledronic acid 4 mg IV", "dexamethasone 4 mg IV"),
              ("lung biopsy", "thoracentesis", "bronchoscopy"), -1.5),
)  # fmt: skip
