#!/bin/sh
# A site of a federation as one process: joins at the first start, then runs. For containers, and for service managers
# that know nothing of fedsplit. With words it runs that command on the folder instead.
#
#     FEDSPLIT_CODE_FILE  a file that holds the join code; or FEDSPLIT_CODE, the code. Wanted at the first start
#     FEDSPLIT_DATA       the site's data, e.g. folder:/data; wanted at the first start
#     FEDSPLIT_TASK       the task that the data is for; wanted at the first start
#     FEDSPLIT_FOLDER     the site folder; else ./site
set -eu

folder=${FEDSPLIT_FOLDER:-site}

if [ $# -gt 0 ]; then
    command=$1
    shift
    case $command in
        doctor) exec fedsplit doctor "$folder" "$@" ;;
        clean) exec fedsplit site clean "$folder" "$@" ;;
        *) exec fedsplit "$command" "$@" ;;
    esac
fi

if [ ! -e "$folder/site.toml" ]; then
    code=${FEDSPLIT_CODE:-}
    if [ -z "$code" ] && [ -r "${FEDSPLIT_CODE_FILE:-/run/secrets/join_code}" ]; then
        code=$(cat "${FEDSPLIT_CODE_FILE:-/run/secrets/join_code}")
    fi
    for wanted in "a join code (FEDSPLIT_CODE_FILE)=$code" \
        "the data (FEDSPLIT_DATA, e.g. folder:/data)=${FEDSPLIT_DATA:-}" \
        "the task (FEDSPLIT_TASK)=${FEDSPLIT_TASK:-}"; do
        if [ -z "${wanted#*=}" ]; then
            echo "this site has not joined yet, and ${wanted%%=*} is not given" >&2
            exit 2
        fi
    done
    # By standard input: what stands on a command line can be read by everybody on the machine.
    printf '%s\n' "$code" | fedsplit site join - --dir "$folder" --data "$FEDSPLIT_DATA" --task "$FEDSPLIT_TASK"
fi
# A code is good for one use: nothing that runs needs it.
unset FEDSPLIT_CODE
exec fedsplit site run "$folder"
