# For both images below: the official image with the client.
FROM apache/airflow:3.3.2-python3.13 AS client
COPY requirements.lock /opt/airflow/
# --no-deps, because the lock names every dependency: no package of Airflow changes its version.
RUN pip install --no-cache-dir --no-deps --require-hashes \
        --requirement /opt/airflow/requirements.lock

# The image to deploy.
FROM client AS airflow
ENV PYTHONPATH=/opt/airflow
COPY plugins /opt/airflow/plugins
COPY include /opt/airflow/include
COPY dags /opt/airflow/dags

# The emulator and what the tests need; never deployed. The emulator's workers need the same Python
# and Polars as Airflow. No COPY of the DAGs: an edit of one must not build this image again.
FROM client AS dev
COPY requirements-dev.lock /opt/airflow/
RUN uv pip install --no-cache --compile-bytecode --require-hashes \
        --requirement /opt/airflow/requirements-dev.lock
COPY emulator /opt/airflow/emulator
ENV PYTHONPATH=/opt/airflow/emulator
