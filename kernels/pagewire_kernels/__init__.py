"""The operations a decoder is made of, behind one small interface with several back ends.

`backend.backend(name)` gives the module of a device; `batch.Batch` says which tokens of which
sequences a step computes; `reference` is the plain oracle that every back end is tested against.
Nothing here knows models, requests or messages.
"""
