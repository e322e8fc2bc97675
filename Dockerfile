# The Airflow that is deployed: the official image, the client, the DAGs.
FROM apache/airflow:3.3.2-python3.13 AS airflow
COPY requirements.lock /opt/airflow/
# Without dependencies, as the lock names them all: nothing that Airflow has is moved to another
# version.
RUN pip install --no-cache-dir --no-deps --require-hashes \
        --requirement /opt/airflow/requirements.lock
ENV PYTHONPATH=/opt/airflow
COPY plugins /opt/airflow/plugins
COPY include /opt/airflow/include
COPY dags /opt/airflow/dags

# The emulator and the tests: never deployed. Built on the above, as its workers must have the same
# Python and Polars.
FROM airflow AS dev
COPY requirements-dev.lock /opt/airflow/
RUN uv pip install --no-cache --compile-bytecode --require-hashes \
        --requirement /opt/airflow/requirements-dev.lock
COPY emulator /opt/airflow/emulator
ENV PYTHONPATH=/opt/airflow:/opt/airflow/emulator
