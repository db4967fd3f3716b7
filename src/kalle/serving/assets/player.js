// Plays the audio of a job while it is being made. Runs in the player's gr.HTML with `element` and `watch`.
// The pieces are fetched as one growing answer of PCM16, so none is lost however the page is redrawn, and put one after
// another on the clock of a Web Audio context that runs at the model's own rate, so there is nothing to resample at a seam.
const rate = Number(element.querySelector('.kalle-player').dataset.rate);
const FIRST_BUFFER_S = 0.2, LARGEST_BUFFER_S = 8, START_S = 0.06;
let context = null, aborter = null, token = '', state = 'idle', ahead = 0;
let sources = [], held = [], heldSamples = 0, next = 0, first = 0, scheduled = 0, buffer = FIRST_BUFFER_S, waiting = true, ended = true, peak = 0;

function wake() {
  if (!context) context = new AudioContext({ sampleRate: rate });
  if (context.state === 'suspended' && state !== 'paused') context.resume();
}
// Browsers let a page make sound only after something was pressed on it.
for (const kind of ['pointerdown', 'keydown']) document.addEventListener(kind, wake, true);

function show() {
  const player = element.querySelector('.kalle-player');
  const played = context && scheduled ? Math.min(Math.max(scheduled / rate - Math.max(next - context.currentTime, 0), 0), scheduled / rate) : 0;
  const total = (scheduled + heldSamples) / rate;
  const words = { idle: 'Nothing to play yet', waiting: ahead ? `In line: ${ahead} before you` : 'Waiting for audio…', playing: 'Playing', paused: 'Paused', done: 'Played', stopped: 'Stopped' };
  const times = total ? ` ${played.toFixed(1)} s of ${total.toFixed(1)} s` : '';
  player.querySelector('.time').textContent = words[state] + times;
  player.querySelector('.meter span').style.width = total ? `${(100 * played) / total}%` : '0';
  const pause = player.querySelector('button');
  pause.disabled = !['playing', 'paused'].includes(state);
  pause.textContent = state === 'paused' ? 'Resume' : 'Pause';
  Object.assign(player.dataset, { state, samples: scheduled + heldSamples, peak: peak.toFixed(4) });
  if (state === 'playing' && ended && !held.length && context.currentTime >= next) { state = 'done'; show(); return; }
}

function flush() {
  const start = context.currentTime + START_S;
  if (next < start) next = start;
  for (const samples of held) {
    const piece = context.createBuffer(1, samples.length, rate);
    piece.copyToChannel(samples, 0);
    const source = context.createBufferSource();
    source.buffer = piece;
    source.connect(context.destination);
    source.start(next);
    sources.push(source);
    next += samples.length / rate;
    scheduled += samples.length;
  }
  held = []; heldSamples = 0; waiting = false;
  if (state === 'waiting') state = 'playing';
}

function take(samples) {
  for (const value of samples) peak = Math.max(peak, Math.abs(value));
  held.push(samples); heldSamples += samples.length;
  // It ran dry: the model is slower than speech here, so gather more before going on.
  if (!waiting && context.currentTime > next) { waiting = true; state = 'waiting'; buffer = Math.min(2 * Math.max(buffer, 0.5), LARGEST_BUFFER_S); }
  if (!waiting || heldSamples / rate >= buffer) flush();
}

function silence() {
  if (aborter) aborter.abort();
  aborter = null;
  for (const source of sources) source.disconnect();
  sources = []; held = []; heldSamples = 0; ended = true;
}

function floats(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  return Float32Array.from({ length: bytes.length / 2 }, (_, at) => view.getInt16(2 * at, true) / 32767);
}

async function count(own, name) {
  while (own === aborter && state === 'waiting' && !scheduled && !held.length) {
    ahead = Number(await (await fetch(`kalle/ahead/${name}`, { signal: own.signal, cache: 'no-store' })).text());
    await new Promise(later => setTimeout(later, 1000));
  }
  ahead = 0;
}

async function play(name) {
  silence();
  wake();
  if (context.state === 'suspended') context.resume();
  const own = aborter = new AbortController();
  Object.assign(element.querySelector('.kalle-player').dataset, { address: `kalle/audio/${name}` });
  state = 'waiting'; scheduled = 0; next = 0; buffer = FIRST_BUFFER_S; waiting = true; ended = false; peak = 0; ahead = 0;
  count(own, name).catch(() => { ahead = 0; });
  try {
    const answer = await fetch(`kalle/audio/${name}`, { signal: own.signal, cache: 'no-store' });
    if (!answer.ok) throw new Error(answer.statusText);
    const reader = answer.body.getReader();
    let rest = new Uint8Array(0);
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const bytes = new Uint8Array(rest.length + value.length);
      bytes.set(rest); bytes.set(value, rest.length);
      const whole = bytes.length - (bytes.length % 2);
      if (whole) take(floats(bytes.subarray(0, whole)));
      rest = bytes.slice(whole);
    }
    if (held.length) flush();
    ended = true;
    if (!scheduled) state = 'idle';
  } catch (error) {
    if (own === aborter) { ended = true; state = 'stopped'; }
  }
}

element.addEventListener('click', event => {
  if (!event.target.closest('button')) return;
  if (state === 'paused') { state = 'playing'; context.resume(); } else if (state === 'playing') { state = 'paused'; context.suspend(); }
  show();
});
document.addEventListener('kalle-silence', () => {
  if (state === 'idle' || state === 'done') return;
  silence(); state = 'stopped';
  if (context) context.resume();
  show();
});
watch('value', () => {
  const given = props.value;
  if (given && given !== token) { token = given; play(given); }
});
setInterval(show, 120);
