"""semper-blkd and its peers side by side: ``python -m bench`` (what ``make bench`` runs).

The machine's speed changes from second to second, so absolute figures say little. Each round runs
every case with every backend, one right after the other in random order, and what counts is the
ratio of a backend to the reference (qemu-storage-daemon with aio=io_uring) *of the same round*;
the median of the rounds is reported with its spread.

    cases, storages, backends   what is measured
    suites                      and together with what
    schedule                    in which order
    load                        one measurement, by the program semper-load
    driver                      all of them
    ratios, verdicts            what follows from them (pure)
    results, machine            what is kept, and on which machine it was seen
    table, plot, markdown       how it is shown
    sections                    where it stands in docs/reference/measurements
    fleet, processes            many disks in one agent, and what the kernel says of them
    scale, idle                 programs of their own: what those disks hold, and use without I/O
    cold                        another: the first second after a start and after a take-over
    migration                   another: guests that move, in three ways
"""
