// What sortkd does with one row of logits, in the browser. tests/test_explorer.py compares it with Python.

/** The probabilities of logits at a temperature. */
function softmax(logits, temperature) {
  const top = Math.max(...logits);
  const powers = logits.map((z) => Math.exp((z - top) / temperature));
  const total = powers.reduce((sum, power) => sum + power);
  return powers.map((power) => power / total);
}

/** The classes above the target, highest first; empty where the teacher is right. */
function classesAbove(logits, target) {
  const above = [...logits.keys()].filter((k) => logits[k] > logits[target]);
  return above.sort((a, b) => logits[b] - logits[a] || a - b);
}

/** The target takes the largest value, and each class above it the value one place below. */
function sortLogits(logits, target) {
  const above = classesAbove(logits, target), result = [...logits];
  [target, ...above].forEach((k, place) => { result[k] = logits[above[place] ?? target]; });
  return result;
}

/** The target and the highest class exchange their values. */
function swapLogits(logits, target) {
  const [winner = target] = classesAbove(logits, target), result = [...logits];
  [result[target], result[winner]] = [logits[winner], logits[target]];
  return result;
}

/** Label revision (Lan et al., 2024): so much of the label is mixed in that the target wins by 1 − eta. */
function reviseLogits(logits, target, eta = 0.8) {
  const [winner] = classesAbove(logits, target), result = [...logits];
  if (winner === undefined) return result;
  const p = softmax(logits, 1);
  const share = eta / (1 + p[winner] - p[target]); // of the teacher; the rest is the label's
  result[target] += Math.log((share * p[target] + 1 - share) / (share * p[target]));
  return result;
}

const REPAIRS = { plain: (logits) => logits, swapped: swapLogits, revised: reviseLogits, sorted: sortLogits };

const rankOf = (values, target) => 1 + values.filter((value) => value > values[target]).length;
const entropy = (p) => -p.reduce((sum, each) => sum + (each > 0 ? each * Math.log(each) : 0), 0);
const totalVariation = (p, q) => p.reduce((sum, each, k) => sum + Math.abs(each - q[k]), 0) / 2;
