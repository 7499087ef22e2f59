"""Owns the life of everything one cluster consists of on this machine; the only importer of Ray."""
