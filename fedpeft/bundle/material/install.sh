#!/bin/sh
# Install fedpeft from this bundle, without a network, on Debian or its like with Python.
#
#   sh install.sh [--prefix DIR] [--fingerprint SIGNER] [--systemd]
#
#   --prefix DIR          where to; default /opt/fedpeft
#   --fingerprint SIGNER  of the key that must have signed the bundle, as heard by telephone
#   --systemd             also put the units and the account in their places (as root)
#
# Reads this folder; writes DIR and, with --systemd, /etc/systemd/system, /etc/sysusers.d and
# /etc/tmpfiles.d; sends nothing. Everything is checked before anything is written. A second
# run changes nothing. An earlier release stays: DIR/current says which one is in use.
#
# This script lies in the bundle that it checks: whoever can exchange the one can exchange the
# other. So compare the SHA-256 of the tar file with the central site's before you unpack it.

set -eu
LC_ALL=C
export LC_ALL
unset PYTHONPATH PYTHONHOME 2>/dev/null || :
umask 022

say() { printf 'install.sh: %s\n' "$*" >&2; }

fail() {
    say "error: $*; nothing was changed"
    exit 1
}

usage() {
    say "usage: sh install.sh [--prefix DIR] [--fingerprint SIGNER] [--systemd]"
    exit 2
}

# Return one fact of bundle.json, which has a line for each.
fact() { sed -n "s/^\"$1\": \"\\{0,1\\}\\([^\",]*\\)\"\\{0,1\\},\\{0,1\\}\$/\\1/p" "$here/bundle.json"; }

read_options() {
    prefix=/opt/fedpeft wanted='' units=no
    while [ $# -gt 0 ]; do
        case $1 in
        --prefix) [ $# -ge 2 ] || usage; prefix=$2; shift ;;
        --fingerprint) [ $# -ge 2 ] || usage; wanted=$2; shift ;;
        --systemd) units=yes ;;
        *) usage ;;
        esac
        shift
    done
    case $prefix in
    /*[!A-Za-z0-9/._-]*) fail "the prefix $prefix has characters that a program's path must not have: name another" ;;
    /?*) prefix=${prefix%/} ;;
    *) fail "the prefix $prefix is no absolute path: name one such as /opt/fedpeft" ;;
    esac
    if [ $units = yes ] && [ "$(id -u)" != 0 ]; then
        fail "--systemd writes to /etc, which only root may: start again as root, or leave it out"
    fi
}

check_files() {
    command -v sha256sum >/dev/null || fail "sha256sum is not here: install the package coreutils"
    for name in SHA256SUMS SHA256SUMS.sig signer.identity bundle.json check_signature.py; do
        [ -f "$here/$name" ] || fail "the bundle has no $name, so it is not whole: copy it again and compare its SHA-256"
    done
    say "checking the files"
    wrong=$(cd "$here" && sha256sum --check --strict --quiet SHA256SUMS 2>&1 | sed -n '1p') || :
    [ -z "$wrong" ] || fail "the bundle is damaged ($wrong): copy it again and compare its SHA-256"
    listed=$(sed 's/^[0-9a-f]*  //' "$here/SHA256SUMS" | sort)
    found=$(cd "$here" && find . ! -type d | sed 's,^\./,,' | grep -vx -e SHA256SUMS -e 'SHA256SUMS\.sig' | sort)
    [ "$listed" = "$found" ] || fail "files were added to the bundle, or are missing from it: unpack it again into an empty folder"
}

# Set $python to one that the wheels are for.
find_python() {
    needed=$(fact python)
    case $needed in '' | *[!0-9.\>=]*) fail "bundle.json of the bundle cannot be read: copy the bundle again" ;; esac
    for python in ${PYTHON:-} "python${needed#>=}" python3; do
        command -v "$python" >/dev/null 2>&1 || continue
        has=$("$python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $needed in
        '>='*) "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue ;;
        *) [ "$has" = "$needed" ] || continue ;;
        esac
        return 0
    done
    if command -v python3 >/dev/null 2>&1; then
        fail "this bundle is for Python $needed and python3 is $(python3 -I -c 'import sys; print("%d.%d" % sys.version_info[:2])'): install Python ${needed#>=}, name it by PYTHON=/path/to/python, or ask for a bundle for yours"
    fi
    fail "there is no python3 here: install Python ${needed#>=} (Debian: the package python3)"
}

check_machine() {
    machine=$(fact machine)
    [ "$machine" = any ] || [ "$machine" = "$(uname -m)" ] ||
        fail "this bundle is for $machine and this machine is $(uname -m): ask for a bundle for $(uname -m)"
    needs=$(fact glibc) has=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed -n 's/^glibc //p') || has=''
    if [ "$needs" != 0 ] && [ "$(printf '%s\n%s\n' "$needs" "${has:-0}" | sort -V | sed -n 1p)" != "$needs" ]; then
        fail "this bundle needs the GNU C library $needs or newer and here is ${has:-another one}: use Debian 12 or newer, or ask for a bundle for yours"
    fi
}

check_signer() {
    signer=$("$python" -I -B "$here/check_signature.py" "$here") ||
        fail "the signature of the bundle is not right: do not use it, and ask the central site by telephone"
    [ -z "$wanted" ] || [ "$wanted" = "$signer" ] ||
        fail "the bundle is signed by $signer and not by $wanted: do not use it, and ask the central site by telephone"
    if [ -f "$prefix/signer.identity" ] && ! cmp -s "$here/signer.identity" "$prefix/signer.identity"; then
        fail "the bundle is signed by $signer, and what is installed was signed by another key: ask the central site by telephone, and only if it changed its key, move $prefix/signer.identity away and start again"
    fi
    say "signed by $signer (compare it with the central site's by telephone)"
}

check_place() {
    release=$prefix/releases/$id
    model=$prefix/models/$(fact model_fingerprint | cut -c1-16)
    if [ -e "$prefix" ] && [ ! -d "$prefix/releases" ] && [ -n "$(ls -A "$prefix" 2>/dev/null)" ]; then
        fail "$prefix holds something else: move it away, or name another place by --prefix"
    fi
    above=$prefix
    while [ ! -e "$above" ]; do above=$(dirname "$above"); done
    [ -w "$above" ] || fail "$above cannot be written: start again as root, or name another place by --prefix"
    [ -f "$release/complete" ] && return 0
    # A quarter more than the files: what Python compiles for itself.
    need=$(($(fact installed_kib) * 5 / 4 + $(du -sk "$here/model" | cut -f1)))
    free=$(df -Pk "$above" | sed -n '2s/  */ /gp' | cut -d' ' -f4)
    [ "$free" -ge "$need" ] || fail "the disk of $above has $((free / 1024)) MiB free and $((need / 1024)) are needed: free some, or name another place by --prefix"
}

# Remove what an interrupted run began, and the folders that it made if they are empty.
undo() {
    trap - EXIT
    rm -rf "$release" "$model.new"
    rmdir "$prefix/releases" "$prefix/models" "$prefix" 2>/dev/null || :
    say "error: the installation did not finish; what was begun is removed"
    exit 1
}

install_release() {
    if [ -f "$release/complete" ]; then
        say "this release is installed already"
        return 0
    fi
    mkdir -p "$prefix/releases" "$prefix/models"
    rm -rf "$release" "$model.new"
    trap undo EXIT INT TERM HUP
    say "installing fedpeft $(fact release) into $release; this takes some minutes"
    # Without pip of its own, as Debian keeps that in a package that may not be here.
    "$python" -I -m venv --without-pip "$release"
    "$release/bin/python" -I "$(echo "$here"/wheels/pip-*.whl)/pip" install --isolated --quiet \
        --no-index --only-binary :all: --no-cache-dir --disable-pip-version-check \
        --find-links "$here/wheels" "fedpeft==$(fact release)"
    "$release/bin/fedpeft" --version >/dev/null
    # By its content, so that a path to it stays right from release to release.
    if [ ! -d "$model" ]; then
        cp -R "$here/model" "$model.new"
        mv -T "$model.new" "$model"
    fi
    ln -s "../../models/${model##*/}" "$release/model"
    cp -R "$here/systemd" "$release/"
    [ ! -d "$here/config" ] || cp -R "$here/config" "$release/"
    sync
    : >"$release/complete"
    trap - EXIT INT TERM HUP
}

# Put the release in use: one rename, so that there is always one or the other.
use_release() {
    ln -sfn "releases/$id" "$prefix/current.new"
    mv -T "$prefix/current.new" "$prefix/current"
    [ -L "$prefix/bin" ] || ln -s current/bin "$prefix/bin"
    [ -L "$prefix/model" ] || ln -s current/model "$prefix/model"
    cmp -s "$here/signer.identity" "$prefix/signer.identity" || cp "$here/signer.identity" "$prefix/signer.identity"
}

install_units() {
    mkdir -p /etc/systemd/system /etc/sysusers.d /etc/tmpfiles.d
    for unit in "$here"/systemd/*.service; do
        sed "s,/opt/fedpeft,$prefix,g" "$unit" >"/etc/systemd/system/$(basename "$unit")"
    done
    cp "$here/systemd/fedpeft.sysusers" /etc/sysusers.d/fedpeft.conf
    cp "$here/systemd/fedpeft.tmpfiles" /etc/tmpfiles.d/fedpeft.conf
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers /etc/sysusers.d/fedpeft.conf
        systemd-tmpfiles --create /etc/tmpfiles.d/fedpeft.conf
    fi
    [ ! -d /run/systemd/system ] || systemctl daemon-reload
    say "the units are in /etc/systemd/system and not started yet: systemctl enable --now fedpeft-client"
}

main() {
    here=$(cd "$(dirname "$0")" && pwd)
    read_options "$@"
    check_files
    check_machine
    find_python
    check_signer
    id=$(fact release)-$(sha256sum <"$here/SHA256SUMS" | cut -c1-12)
    check_place
    install_release
    use_release
    [ $units = no ] || install_units
    say "done: $prefix/bin/fedpeft-client --help; the base model is $prefix/model"
}

# The last line, so that a script that was cut short does nothing.
main "$@"
