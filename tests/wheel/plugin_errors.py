"""Print the import errors of the plugins folder; the last line of the output is JSON."""

import json

from airflow import __version__, plugins_manager

if __name__ == "__main__":
    plugins_manager.ensure_plugins_loaded()
    if __version__.startswith("3.1."):
        errors = plugins_manager.import_errors
    else:
        errors = plugins_manager.get_import_errors()
    print(json.dumps({"airflow": __version__, "errors": errors}))
