# What both images below have: the official image, and the client.
FROM apache/airflow:3.3.2-python3.13 AS client
COPY requirements.lock /opt/airflow/
# Without dependencies, as the lock names them all: nothing that Airflow has is moved to another
# version.
RUN pip install --no-cache-dir --no-deps --require-hashes \
        --requirement /opt/airflow/requirements.lock

# The Airflow that is deployed.
FROM client AS airflow
ENV PYTHONPATH=/opt/airflow
COPY plugins /opt/airflow/plugins
COPY include /opt/airflow/include
COPY dags /opt/airflow/dags

# The emulator and what the tests need: never deployed. Its workers must have Airflow's Python and
# Polars; an edit of a DAG does not build it anew.
FROM client AS dev
COPY requirements-dev.lock /opt/airflow/
RUN uv pip install --no-cache --compile-bytecode --require-hashes \
        --requirement /opt/airflow/requirements-dev.lock
COPY emulator /opt/airflow/emulator
ENV PYTHONPATH=/opt/airflow/emulator
