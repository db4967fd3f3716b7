#!/usr/bin/env bash
# Two systems speak a list of cloning, and two blinded pages come out: naturalness (MOS) and likeness of the speaker (SMOS). README.md has the protocol.
#
#   recipes/listening/run.sh runs/listening new=ckpt/kalle-nano old=FOLDER      # weight folders, or folders of ID.wav for the list's ids
#   ITEMS=5 recipes/listening/run.sh runs/try new=ckpt/kalle-nano old=FOLDER '~metrics.wer' '~metrics.sim'
#   LIST=list.jsonl recipes/listening/run.sh runs/listening new=FOLDER old=FOLDER
#
# LIST is a test list with prompts and recordings; without one, ITEMS of the embedded recordings, each in the voice of another. More words go
# to `kalle evaluate`. Run it again after an interruption: what is spoken is kept.
set -euo pipefail
here=$(dirname "$0")
out=${1:?the folder to write} one=${2:?NAME=FOLDER} other=${3:?NAME=FOLDER, the other system} && shift 3
list=${LIST:-$out/list.jsonl}
if [[ -z ${LIST:-} ]]; then
  python "$here/../at_hand.py" librispeech "$out/data" --items "${ITEMS:-10}"
  python "$here/../librispeech_cloning/lists.py" cross "$out/data" "$list" --pairs "$out/data/pairs.lst"
fi
python "$here/recorded.py" "$list" "$out" ${ITEMS:+--items "$ITEMS"}

speak() { # NAME=FOLDER words...
  local name=${1%%=*} folder=${1#*=} source && shift
  [[ -n $folder && $name != "$folder" ]] || { echo "system: got '$name', expected NAME=FOLDER" >&2 && exit 2; }
  [[ -d $folder && ! -f $folder/config.json ]] && source=(kind=wavs wavs="$folder") || source=(kind=synthesis model="$folder" synthesis.prompts=list)
  kalle evaluate "${source[@]}" testset.path="$list" testset.min_words=0 ${ITEMS:+testset.limit="$ITEMS"} out="$out/$name" "$@"
}
for system in "$one" "$other"; do speak "$system" check=true "$@"; done
for system in "$one" "$other"; do speak "$system" "$@"; done
systems=("${one%%=*}=$out/${one%%=*}" "${other%%=*}=$out/${other%%=*}" "recording=$out/recordings")
[[ -f $out/mos/key.json ]] || kalle listening make "${systems[@]}" --out "$out/mos"
[[ -f $out/smos/key.json ]] || kalle listening make "${systems[@]}" --kind smos --references "$out/references" --out "$out/smos"
