"""The lab: compares two runs and says whether they are the same run, or the first cause why not."""
