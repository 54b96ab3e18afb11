"""The official JSON Schema of AsyncAPI, from npm (`@asyncapi/specs`, Apache-2.0): see `tests.npm`."""
