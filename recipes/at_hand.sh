# Sourced by the recipes of evaluation. AT_HAND=1 scores with the models that ordinary packages hold, in place of the protocol's own: quick, offline,
# and not comparable with published numbers; the report names what was used. ITEMS=N scores the first N lines.
score=()
if [[ -n ${AT_HAND:-} ]]; then
  score+=(metrics.wer.recogniser=faster_whisper metrics.wer.model=auto)
  [[ ${SIM:-yes} == no ]] || score+=(metrics.sim.model=ge2e)
  [[ ${UTMOS:-yes} == no ]] || score+=('~metrics.utmos' '+metrics.distillmos._target_=kalle.evaluation.opinion.DistillMOS')
fi
[[ -z ${ITEMS:-} ]] || score+=(testset.limit="$ITEMS")
