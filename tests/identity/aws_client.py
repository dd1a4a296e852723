import boto3
session = boto3.session.Session(region_name="us-east-1")
print(session.get_credentials().get_frozen_credentials().access_key)
