"""Buckets of the emulator's S3 that refuse a query."""

import json

import boto3


def create_bucket_elsewhere(name: str) -> None:
    """Create a bucket in a region that the emulator's workers do not use."""
    boto3.client("s3").create_bucket(
        Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )


def create_bucket_of_others(name: str) -> None:
    """Create a bucket that denies all access to its objects."""
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=name)
    objects = {"Effect": "Deny", "Principal": "*", "Action": "s3:*"}
    statement = {**objects, "Resource": f"arn:aws:s3:::{name}/*"}
    s3.put_bucket_policy(
        Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    )
