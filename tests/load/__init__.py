"""
Speed, memory and fairness, measured: `make bench`, `make load`, `make figures`, and CPU by stage.

    bench         the command: runs scenarios, prints the table, exits with 1 when a target is missed
    scenarios     what is measured, and the targets
    processes     mock, yardstick, proxy and generator as processes on cores of their own
    results       the arithmetic: medians, ideals, rows of the table
    profile_cpu   CPU per request, by scenario and by stage
    adapter       the speed of rag_adapter, with its targets: `make bench-adapter`
    suite/        before and after: the old method, its first repair and the adapter under load, with a report
    figures       start to ready, and memory, for docs/operations.md
    mock          an upstream that costs next to nothing
    generator     callers that look at every vector
    bare          the yardstick: a reverse proxy of thirty lines
    vectors       the vector of a text, known to mock and generator alike
"""
