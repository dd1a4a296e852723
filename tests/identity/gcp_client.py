import os
from google.auth import identity_pool
from google.auth.transport.requests import Request
# As google.auth.default() makes them of this file, which would also ask Google for the project.
credentials = identity_pool.Credentials.from_file(
    os.environ["GOOGLE_APPLICATION_CREDENTIALS"],
    scopes=["https://www.googleapis.com/auth/cloud-platform"])
credentials.refresh(Request())
print(credentials.token)
