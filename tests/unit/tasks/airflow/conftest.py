import tests.import_tasks  # noqa: F401 - before any test here imports from `tasks`
