"""
embedding-sidecar: a local proxy that owns all upstream embedding calls of an app.

The life of a request, and where to read on:

    caller ──► edge.accept        names the route, checks who asks, reads the body within its bounds
               edge.decode        JSON → Request: valid, with its key per input and its deadline
               funnel.admission   too much inside? refused at once; from here on the deadline rules
               funnel.cache       known inputs are answered; only the others go on
               funnel.coalesce    an equal input is under way? then this one waits for the same call
               funnel.microbatch  Requests → Batches, composed when a lease lets one leave; the only change of currency
               upstream.attempt   tries, each with a new choice; waits between them, never past the deadline
               upstream.balance   hands out the leases: an upstream that has shown the right vectors, a free slot of it
               upstream.bucket    the upstream's limits per minute, and its word when it asks to be left alone
               upstream.circuit   an upstream that fails is left alone; one probe finds its recovery
               upstream.translate Batch → HTTP in the upstream's dialect, and its answer or error back
               upstream.transport the exchange, on a pooled connection, within its time
               upstream.vectors   the gate: count, width, finite, not zero; or BadVectors
               ...and up the same stairs: rows into the cache, to all who wait for them, put together by position
    caller ◄── edge.encode        base64 or floats, as asked; an error in OpenAI's shape

`wiring.pipeline.ROUTE` states this order with its reasons and nests the stages in it. `wiring.lifecycle` owns the
process, `wiring.config` reads the settings, `wiring.server` opens the sockets, `wiring.connection` is one caller's.
Stages tell frozen facts (`base.events`) to `watch`, which makes metrics and log lines of them. Each stage obeys
`base.stage`: call it, ask its snapshot, close it. How the engine decides is told in docs/engine.md.

Everything has a bound (`base.settings`), everything waits by a clock it was given (`base.clock`), and whatever goes
wrong is one of the errors of `base.errors`, which say whose fault it is and whether another try may help.
"""
