"""The server on Ray Serve: one ingress, and replicas of the engine, each with the whole HTTP application inside.

```
Ray's HTTP proxy ──► Ingress (front_app.py)               Engine (replica.py), as many as there are replicas
                     gate, page, models, loading           placement.py   makes the delta resident, counts
                     forwarding.py   model ─► delta ─────► http/app.py    answers as `metier serve` alone does
                     names.py        what is served
                     replicas.py     what all replicas are told and say
```

Ray Serve places replicas and routes: a request carries its delta's name as the id that model multiplexing goes by.
"""
