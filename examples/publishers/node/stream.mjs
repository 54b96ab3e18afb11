// Ask for a DAG run over a Redis Stream, and hear how it ended.
//
//   node stream.mjs '{"dag_id": "daily_sales", "conf": {"day": "2026-11-20"}, "key": "2026-11-20", "wait": true}'
//
// Prints every answer as a line of JSON. Ends with 0 when the request is done, 1 when it failed or was refused.
// Settings: REDIS_URL, STREAM.
import { randomUUID } from "node:crypto";
import { createClient } from "redis";

const stream = process.env.STREAM ?? "dag-triggers";
const replies = `replies.${randomUUID()}`; // of this process; the listener's --reply-to allows replies*

const client = createClient({ url: process.env.REDIS_URL, disableOfflineQueue: true });
client.on("error", (error) => console.error(error.message));
await client.connect();

const message = { id: randomUUID(), reply_to: replies, ...JSON.parse(process.argv[2]) };
await client.xAdd(stream, "*", { data: JSON.stringify(message) });

let last = "0";
let state;
while (state === undefined) {
  const found = await client.xRead({ key: replies, id: last }, { BLOCK: 5000, COUNT: 10 });
  for (const { id, message: entry } of found?.[0].messages ?? []) {
    last = id;
    const answer = JSON.parse(entry.data);
    console.log(JSON.stringify(answer));
    if (["refused", "ended", "corrected"].includes(answer.what)) state = answer.state;
  }
}
await client.del(replies);
await client.close();
process.exit(state === "done" ? 0 : 1);
