"""Calibration: which engine, how many queues for each thread, how much polling (US11210127B2).

    candidates    what can be tried on a storage (pure)
    figures       what a measurement shows, and comparing it in pairs (pure)
    bounds        what a candidate is held to (pure)
    judgement     who drops out, who wins, and why (pure)
    plan          how many rounds, how long each measurement (pure)
    scratch       the image that is measured on
    served        a backend that runs for a measurement
    load          one measurement, by the program semper-load
    driver        carries a plan out
    rules         presets for what cannot be measured here
    preparation   what there is to do
    tune          storages and devices, one after the other; what is stored
    report        what is told about it

The objective, and why it is what it is: docs/design/calibration.md.
"""
