"""Programs that make what tests read. Not tests themselves."""

import tests.import_tasks  # noqa: F401 - before any of them imports from `tasks`
