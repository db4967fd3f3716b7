// Keeps the speech of this page for as long as it is open, in the browser alone: the server's file goes with the next request.
async (audio) => {
  const MOST = 20, box = document.querySelector('.kalle-history'), facts = document.querySelector('#facts .kalle-facts');
  if (!audio?.url || !facts || facts.dataset.kept) return;
  facts.dataset.kept = 'yes';
  const fact = name => [...facts.querySelectorAll('dt')].find(each => each.textContent === name)?.nextElementSibling.textContent || '';
  const answer = await fetch(audio.url);
  if (!answer.ok) return;
  const text = facts.dataset.text, address = URL.createObjectURL(await answer.blob()), list = box.querySelector('ol');
  const entry = document.createElement('li'), said = document.createElement('p'), numbers = document.createElement('small');
  const sound = new Audio(address), again = document.createElement('button'), save = document.createElement('a');
  said.textContent = text;
  numbers.textContent = `${fact('Voice')}, seed ${fact('Seed')}, ${fact('Length')}`;
  Object.assign(sound, { controls: true, preload: 'metadata' });
  sound.setAttribute('aria-label', `Speech of: ${text.slice(0, 60)}`);
  sound.addEventListener('play', () => document.dispatchEvent(new Event('kalle-silence')));
  Object.assign(save, { href: address, download: `kalle-${fact('Seed')}.wav`, textContent: 'Download' });
  Object.assign(again, { type: 'button', textContent: 'Use this text' });
  again.setAttribute('aria-label', `Use this text: ${text.slice(0, 60)}`);
  again.addEventListener('click', () => {
    const field = document.querySelector('#text textarea');
    field.value = text;
    field.dispatchEvent(new Event('input', { bubbles: true }));
    field.focus();
  });
  entry.append(said, sound, numbers, save, again);
  list.prepend(entry);
  while (list.children.length > MOST) {
    URL.revokeObjectURL(list.lastElementChild.querySelector('audio').src);
    list.lastElementChild.remove();
  }
  box.hidden = false;
  box.querySelector('summary').textContent = `Spoken on this page (${list.children.length})`;
}
