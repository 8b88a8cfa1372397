"""
Floor 2, one call to one server: attempt → balance → bucket → circuit → translate → transport → vectors.

`builtin` is another end of the journey: the embedded model, in place of translate and transport.
"""
