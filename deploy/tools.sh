#!/bin/sh
# Installs the Debian packages that make deploy-check uses, as root and where apt-get is; elsewhere
# names what is lacking. Arguments: program:package. Never fails: tests skip what they cannot have.
packages= programs=
for pair in "$@"; do
    if ! command -v "${pair%%:*}" >/dev/null; then
        programs="$programs ${pair%%:*}"
        packages="$packages ${pair##*:}"
    fi
done
[ -z "$packages" ] && exit 0
if [ "$(id -u)" != 0 ]; then
    echo "LACKING:$programs; as root this would install$packages. What needs them is skipped." >&2
elif ! command -v apt-get >/dev/null; then
    echo "LACKING:$programs, and there is no apt-get. What needs them is skipped." >&2
else
    echo "installing$packages"
    apt-get update -qq || echo "LACKING: the lists of packages could not be read" >&2
    for package in $packages; do
        # One at a time: what cannot be had must not keep the others away.
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends \
            -o Dpkg::Use-Pty=0 "$package" >/dev/null ||
            echo "LACKING: $package cannot be installed. What needs it is skipped." >&2
    done
fi
exit 0
