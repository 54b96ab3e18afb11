// Call tasks.trigger_dag from Node as a Celery task, and wait for its result.
//
//   node trigger.mjs '{"dag_id": "daily_sales", "conf": {"day": "2026-11-20"}, "key": "2026-11-20"}'
//
// Prints the run. Ends with 1 when the task failed. Settings: DAGRELAY_REDIS_URL, the Redis of the workers.
import celery from "celery-node";

const redis = process.env.DAGRELAY_REDIS_URL ?? "redis://127.0.0.1:6379/0";
const client = celery.createClient(redis, redis, "triggers"); // jobs go to the queue "jobs"
await client.isReady(); // else a Redis that is away is noticed by nobody

// Keyword arguments alone, and the version of the contract: see docs/messages.schema.json, TriggerRequest.
const task = client.createTask("tasks.trigger_dag").applyAsync([], { v: 1, ...JSON.parse(process.argv[2]) });
console.error(task.taskId);
try {
  console.log(JSON.stringify(await task.get(Number(process.env.TIMEOUT_MS ?? 60_000))));
} catch (error) {
  console.error(error.message ?? error);
  process.exitCode = 1;
} finally {
  await client.disconnect();
}
