#!/bin/sh
# The server of a federation as one process: makes its folder at the first start, then runs it. For containers, and for
# service managers that know nothing of fedsplit. With words it runs that command on the folder instead.
#
#     FEDSPLIT_HOST    the name or address that sites dial; wanted at the first start
#     FEDSPLIT_PORT    the one public port; else 8443
#     FEDSPLIT_FOLDER  the federation folder; else ./federation
set -eu

folder=${FEDSPLIT_FOLDER:-federation}

if [ $# -gt 0 ]; then
    command=$1
    shift
    case $command in
        doctor) exec fedsplit doctor "$folder" "$@" ;;
        federation)
            name=${1:?give a command of fedsplit federation, e.g. list}
            shift
            exec fedsplit federation "$name" --federation "$folder" "$@"
            ;;
        run | status) exec fedsplit "$command" --federation "$folder" "$@" ;;
        *) exec fedsplit "$command" "$@" ;;
    esac
fi

if [ ! -e "$folder/federation.toml" ]; then
    if [ -z "${FEDSPLIT_HOST:-}" ]; then
        echo "FEDSPLIT_HOST is not set: give the name or address of this machine that sites dial" >&2
        exit 2
    fi
    fedsplit server init "$folder" --host "$FEDSPLIT_HOST" --port "${FEDSPLIT_PORT:-8443}"
fi
exec fedsplit server up "$folder"
