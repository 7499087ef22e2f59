#!/bin/sh
# Latency against offered rate: one result per rate, requests/s, in FOLDER.
#   bench/rates.sh FOLDER "0.5 1 2 4" [options of pdserve bench]
set -eu
folder=$1
rates=$2
shift 2
mkdir -p "$folder"
for rate in $rates; do
    pdserve bench --rate "$rate" --out "$folder/rate-$rate.json" "$@"
done
