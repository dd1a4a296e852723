//! Whom the minter trusts: the certificates of `ca_file`, else the system's own bundle.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use crate::model::mint::{Failure, Fault};

/// Where distributions keep the bundle: Debian and Alpine, Fedora, SUSE.
const BUNDLES: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
];
const MOST: u64 = 8 << 20;

/// The text, not yet looked at. None where nothing is configured and this system has no bundle: that matters
/// only where TLS is spoken.
///
/// # Errors
/// What is configured cannot be read.
pub fn read(ca_file: Option<&Path>) -> Result<Option<Vec<u8>>, Failure> {
    let text = |path: &Path| -> std::io::Result<Vec<u8>> {
        let mut text = Vec::new();
        File::open(path)?.take(MOST).read_to_end(&mut text)?;
        Ok(text)
    };
    match ca_file {
        Some(path) => text(path).map(Some).map_err(|_| Failure::of(Fault::CaFile)),
        None => Ok(BUNDLES.iter().find_map(|path| text(Path::new(path)).ok())),
    }
}

/// # Errors
/// There is no certificate in it that could be trusted.
pub fn config(pem: Option<&[u8]>) -> Result<Arc<ClientConfig>, Failure> {
    let unusable = || Failure::of(Fault::CaFile);
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_slice_iter(pem.unwrap_or_default()).flatten();
    // Bundles hold some that are old and odd: those are left out.
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(unusable());
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|_| unusable())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    // Each call stands for itself, and a server of OpenSSL's that asks for client certificates, as rusty_vault
    // does, may refuse to resume: SSL_CTX_set_session_id_context(3).
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}
