# Sourced by every template inside a job, from the repository's root: with M3I_CONTAINER all of
# the job's Python runs in that image (containers/ has recipes), else nothing happens here.
#
#   M3I_CONTAINER=/images/m3i.sif      Apptainer
#   M3I_CONTAINER=/images/m3i.sqsh     pyxis; also what it fetches by itself: REGISTRY#NAME:TAG
#   M3I_MOUNTS=/data,/scratch          folders that are needed there; the repository is always
#
# Changes the arrays `python` and `srun_options`. The code is the checkout's, not the image's.

enter_container() {
    local image=$M3I_CONTAINER mounts=$PWD mount apptainer
    [[ ${M3I_FOLDER:-} == /* ]] && mounts+=,$M3I_FOLDER
    mounts+=${M3I_MOUNTS:+,$M3I_MOUNTS}
    if [[ $image == /* || $image == ./* || $image == *.sif || $image == *.sqsh ]] && [[ ! -e $image ]]; then
        echo "M3I_CONTAINER is $image: there is no such image on this node; build it (containers/)," \
            "on a file system that all nodes see" >&2
        exit 2
    fi
    export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
    case $image in
        *.sif)
            apptainer=$(command -v apptainer || command -v singularity) || {
                echo "M3I_CONTAINER is $image, and this node has neither apptainer nor singularity:" \
                    "load its module in the template's site block" >&2
                exit 2
            }
            python=("$apptainer" exec --pwd "$PWD")
            [[ ${M3I_DEVICE:-cuda} == cpu ]] || python+=(--nv)
            IFS=, read -ra mounts <<< "$mounts"
            for mount in "${mounts[@]}"; do python+=(--bind "$mount"); done
            python+=("$image" python)
            ;;
        *)
            # pyxis mounts SOURCE:TARGET
            mounts=$(sed 's/\([^,]*\)/\1:\1/g' <<< "$mounts")
            srun_options+=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD")
            python=(python)
            ;;
    esac
}

[[ -z ${M3I_CONTAINER:-} ]] || enter_container
