"""Measurements side by side: ours and its yardstick in one run, as ratios with intervals.

``python -m bench NAME...`` runs the named ones, ``python -m bench --list`` tells them. Every result
is one JSON file with machine, versions, commit and seed (bench/record.py). Load on a running
server is not measured here but by ``pdserve bench``.
"""
