(text) => {
  const count = document.querySelector('.kalle-count'), limit = Number(count.dataset.limit), length = [...(text || '')].length;
  count.textContent = `${length} of ${limit} characters`;
  count.classList.toggle('over', length > limit);
}
