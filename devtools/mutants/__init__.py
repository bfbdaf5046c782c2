"""Small faults planted in the pack's code one at a time, to count how many of them the tests find.

cosmic-ray plants them (`pip install cosmic-ray`; nothing else here needs it). `sampling` draws a
fixed sample, `related_tests` says which tests know a source file, `running` runs them, `results`
keeps and compares what came out.
"""
