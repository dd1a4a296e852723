from azure.identity import WorkloadIdentityCredential
credential = WorkloadIdentityCredential(disable_instance_discovery=True)
print(credential.get_token("https://vault.azure.net/.default").token)
