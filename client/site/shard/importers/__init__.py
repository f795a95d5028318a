"""From what a hospital has to the shard contract: MIMIC-IV's layout and MEDS.

Both importers bring their source into one form, a timeline of stays and what became known during
them (`timeline`), and share all that follows: labels, sites, patients who object, counting what is
skipped, and writing shards out of core, whole or not at all (`staging`).
"""
