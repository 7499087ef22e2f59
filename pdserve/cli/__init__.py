"""The ``pdserve`` command. Modules import what they need when they need it: help is instant."""
