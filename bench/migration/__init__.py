"""A guest moves between two hosts, in three ways side by side: ``python -m bench --suite migrate``.

The hosts are network namespaces of this machine; what goes over the link between them is counted by
its interfaces. Each measurement boots a guest of its own, so that no way profits from another.

    guests      the four guests, and what each does before it moves
    ends        one host: QEMU and the disks' backends
    ways        stock QEMU, QEMU's multifd with zstd, semper-wired
    pulse       the guest's heartbeat, as both hosts hear it
    trial       one guest, moved once
    figures     what is kept, ratios, goals (pure)
    show        tables, Markdown, a picture
    program     the command line

The namespaces, the link and the client outside are those of the tests (`tests/migration`).
"""
