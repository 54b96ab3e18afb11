// Ask for a DAG run over HTTP, with nothing but Node itself.
//
//   node http.mjs daily_sales '{"conf": {"day": "2026-11-20"}}' sales-2026-11-20
//
// The third argument is the Idempotency-Key: the same again is the same run. Prints the answer. Ends with 0,
// 65 (refused: the answer says why) or 75 (no answer: send it again with the same key).
// Settings: DAGRELAY_URL, DAGRELAY_TOKEN.
import { setTimeout as pause } from "node:timers/promises";

const [dagId, body, key] = process.argv.slice(2);
const url = new URL(
  `/v1/dags/${encodeURIComponent(dagId)}/runs`,
  process.env.DAGRELAY_URL ?? "http://127.0.0.1:8080",
);
const headers = { "Content-Type": "application/json", "Idempotency-Key": `"${key}"` };
if (process.env.DAGRELAY_TOKEN) headers.Authorization = `Bearer ${process.env.DAGRELAY_TOKEN}`;

async function ask() {
  for (let attempt = 0; attempt < 4; attempt++) {
    try {
      const answer = await fetch(url, { method: "POST", headers, body, signal: AbortSignal.timeout(15_000) });
      if (answer.status !== 429 && answer.status < 500) return answer;
      await pause(1000 * Number(answer.headers.get("Retry-After") ?? 1));
    } catch (error) {
      console.error(error.cause?.message ?? error.message);
      await pause(250 * 2 ** attempt);
    }
  }
  return undefined; // whether it was taken is unknown: with the same key it may be sent again
}

const answer = await ask();
if (answer !== undefined) console.log(await answer.text());
process.exitCode = answer === undefined ? 75 : answer.ok ? 0 : 65;
