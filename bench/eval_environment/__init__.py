"""lmms-eval in front of this environment, for the tests of our plug-in: a folder that pip fills once."""
