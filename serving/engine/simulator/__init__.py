"""A stand-in for one vLLM server: the same HTTP, made-up words, chosen speed, and failures on request.

Shipped code, used by the tests and by `PROFILE=sim`; `tests/engine/test_conformance.py` holds it to the real engine.
It never imports vllm or ray, so that it starts in a fraction of a second and two thousand streams fit on half a core.

    __main__.py   arguments, start, ready line, stop        wire.py     vLLM's JSON and event bytes, its errors
    app.py        routes; one request's life                tokens.py   text <-> token ids; the made-up answer
    asgi.py       one HTTP exchange                         metrics.py  vLLM's metric names
    core.py       slots and the token clock                 sins.py     scripted failures, each one hook
    kv.py         KV room that prompts share
"""
