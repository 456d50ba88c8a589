"""The first second of a backend: ``python -m bench --suite cold``.

Other measurements begin when everything is warm. Here the load begins with the backend, and in the
middle of it the backend is killed and its spare takes over; what counts are the requests in the
first 100 ms and in the first second of each, and how long it takes until the throughput is back.

    trial       one load on one engine, with a start and a take-over
    effort      what the first requests cost in processor time, beside the later ones
    figures     what follows from it, ratios, what is asked for (pure)
    show        tables
    program     the command line
"""
