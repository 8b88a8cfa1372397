"""
Before and after: the old method, its first repair, and the adapter with the proxy, under the same loads. `make load`.

    __main__      the command: runs scenarios, shows progress, writes the report, exits with 1 when a promise is broken
    report        the HTML page: one file, nothing from outside
    plots         its pictures
    summary       the terminal: progress, and the table of promises
    promises      what has to hold, as rows with bound and measured value
    perform       one contestant in one scenario: processes started, faults made, everything watched
    scenarios     the situations, as data
    runs          what was seen in one, and its figures
    upstream      the upstream as a process that can be changed, killed and brought back
    app           the app: its own process, with one contestant in its event loop
    contestants   the three ways to embed
    probes        event loop from inside; threads, memory, CPU, breaker from outside
    arrivals      when requests are meant to start
    ledger        what was asked, and what became of it
"""
