//! What `--help` of `sublet issuer` ends with.
#![forbid(unsafe_code)]

pub const HELP: &str = "\
Examples:
  sublet issuer init --url https://id.example.com/host-1
  sublet issuer publish --out /srv/www/host-1
  sublet issuer show --profile deploy --agent ci
  sublet issuer rotate

Exit status:
  0    done
  1    the answer is no: this host has no issuer yet, or has one already
  2    sublet could not do it";

pub const INIT: &str = "\
Examples:
  sublet issuer init --url https://id.example.com/host-1

Exit status:
  0    the issuer and its first key are made and on disk
  1    this host has an issuer already
  2    it could not be made: the state cannot be written";

pub const ROTATE: &str = "\
Examples:
  sublet issuer rotate
  sublet issuer rotate --lead 2h
  sublet issuer rotate --withdraw

Exit status:
  0    the key is made
  1    this host has no issuer
  2    it could not be made

Notes:
  The old key signs until the new one does, and stays published until its last token has expired. With
  --withdraw tokens that live are refused as soon as relying parties read the key set again.";

pub const LIST: &str = "\
Examples:
  sublet issuer list
  sublet issuer list --json | jq -r 'select(.state == \"signing\").kid'

Exit status:
  0    listed
  1    this host has no issuer
  2    it could not be read";

pub const SHOW: &str = "\
Examples:
  sublet issuer show
  sublet issuer show --profile deploy --agent ci --json | jq -r .subject

Exit status:
  0    shown
  1    this host has no issuer
  2    it could not be read";

pub const PUBLISH: &str = "\
Examples:
  sublet issuer publish --out /srv/www/host-1

Exit status:
  0    both files are written, each whole
  1    this host has no issuer
  2    they could not be written

Files:
  DIR/.well-known/openid-configuration  the discovery document
  DIR/.well-known/jwks.json             the key set";

pub const SERVE: &str = "\
Examples:
  sublet issuer serve --listen 127.0.0.1:8085

Exit status:
  0    it was told to end
  1    this host has no issuer
  2    it could not begin

Notes:
  Put a web server that speaks TLS in front. What is published next is served without a start anew.";

pub const K8S: &str = "\
Examples:
  sublet issuer k8s --client-id 11111111-… --tenant-id 22222222-… | kubectl apply -f -
  sublet issuer k8s --client-id 11111111-… --tenant-id 22222222-… --json | jq .pod_template

Exit status:
  0    printed
  2    bad usage";
