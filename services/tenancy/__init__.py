"""Tenants: who may use a gateway, by which key, and how much.

`keys` is the file of keys, `doors` lets requests in or refuses them, `measured` counts by tenant.
"""
