"""A module as a service: predictions over HTTP, on the machine of a line or in a site's resident runtime.

listening.py   what is listened on, TLS and token; the service in a thread of its own
gate.py        who may ask, and the access log
app.py         the paths and their answers
bodies.py      a request's body, bounded, as samples
answering.py   the queue, batches, and the module in use, which is swapped between two requests
follow.py      brings the module that another was promoted to
counts.py      what was answered and how long it took; Prometheus' form of it
"""
