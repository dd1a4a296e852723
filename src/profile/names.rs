//! Environment names that nobody may set freely. Names go in, a class comes out.
//!
//! A profile is checked against this as it is parsed; flags and files in `policy::environment`, which
//! knows where a name comes from and which leases the exec carries.
#![forbid(unsafe_code)]

/// What a name is, whoever sets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameClass {
    /// Nothing speaks against it.
    Free,
    /// Set by sublet alone: an identity or a delivery would be forged with it.
    Reserved,
    /// A long-lived key by its very name; no one sets it, and no lease delivers it.
    Refused,
    /// A long-lived key by its name, which only a lease may deliver.
    OnlyByLease,
    /// Changes what code is loaded: only a profile's `environment.set`.
    Loader,
    /// `HOME` and `PATH`: `filesystem.home` and `environment.path` of the profile.
    OfProfile,
    /// Redirects git or weakens its TLS: reserved in an exec that carries a git lease.
    Git,
}

/// The class of a name. Environment names are case-sensitive, but for the proxy variables, which
/// libcurl reads in both cases.
pub fn class(name: &str) -> NameClass {
    match name {
        "HOME" | "PATH" => NameClass::OfProfile,
        "AZURE_CLIENT_SECRET" | "AZURE_CLIENT_CERTIFICATE_PATH" => NameClass::Refused,
        "AWS_SECRET_ACCESS_KEY" => NameClass::OnlyByLease,
        "AZURE_CLIENT_ID"
        | "AZURE_TENANT_ID"
        | "AZURE_AUTHORITY_HOST"
        | "AZURE_FEDERATED_TOKEN_FILE"
        | "AZURE_FEDERATED_TOKEN"
        | "AWS_ROLE_ARN"
        | "AWS_WEB_IDENTITY_TOKEN_FILE"
        | "AWS_ROLE_SESSION_NAME"
        | "GOOGLE_APPLICATION_CREDENTIALS"
        | "CREDENTIALS_DIRECTORY" => NameClass::Reserved,
        // glibc reads its tunables in the loader, before anything of the program runs.
        "GLIBC_TUNABLES" => NameClass::Loader,
        "SSL_CERT_FILE"
        | "SSL_CERT_DIR"
        | "SSLKEYLOGFILE"
        | "CURL_CA_BUNDLE"
        | "REQUESTS_CA_BUNDLE"
        | "NODE_EXTRA_CA_CERTS"
        | "OPENSSL_CONF"
        | "OPENSSL_MODULES"
        | "OPENSSL_ENGINES"
        | "GNUTLS_SYSTEM_PRIORITY_FILE" => NameClass::Git,
        _ if ["SUBLET_", "AZURE_KUBERNETES_", "AWS_CONTAINER_"]
            .iter()
            .any(|p| name.starts_with(p)) =>
        {
            NameClass::Reserved
        }
        _ if name.starts_with("LD_") => NameClass::Loader,
        _ if name.starts_with("GIT_") || is_proxy(name) => NameClass::Git,
        _ => NameClass::Free,
    }
}

fn is_proxy(name: &str) -> bool {
    ["http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"]
        .iter()
        .any(|proxy| name.eq_ignore_ascii_case(proxy))
}

/// Why nobody but sublet and leases set a name of this class, as the end of "`NAME` …"; nothing for a
/// name that is free.
pub fn why(class: NameClass) -> Option<&'static str> {
    match class {
        NameClass::Free => None,
        NameClass::Reserved => Some("is reserved: sublet sets it for identities and deliveries"),
        NameClass::Refused => {
            Some("names a long-lived key, which no exec gets; use a lease of a short-lived one")
        }
        NameClass::OnlyByLease => {
            Some("names a long-lived key, which only a lease delivers (`variable` of an audience)")
        }
        NameClass::Loader => {
            Some("changes what code is loaded, so only `environment.set` of a profile sets it")
        }
        NameClass::OfProfile => {
            Some("comes from the profile: `filesystem.home` for HOME, `environment.path` for PATH")
        }
        NameClass::Git => {
            Some("could send a git credential elsewhere, so it is reserved while git holds a lease")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_names() {
        #[track_caller]
        fn check(name: &str, expected: NameClass) {
            assert_eq!(class(name), expected, "{name}");
        }
        for name in [
            "SUBLET_SOCKET",
            "AZURE_CLIENT_ID",
            "AZURE_TENANT_ID",
            "AZURE_AUTHORITY_HOST",
            "AZURE_FEDERATED_TOKEN_FILE",
            "AZURE_FEDERATED_TOKEN",
            "AZURE_KUBERNETES_TOKEN_PROXY",
            "AWS_ROLE_ARN",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_ROLE_SESSION_NAME",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "CREDENTIALS_DIRECTORY",
        ] {
            check(name, NameClass::Reserved);
        }
        for name in ["AZURE_CLIENT_SECRET", "AZURE_CLIENT_CERTIFICATE_PATH"] {
            check(name, NameClass::Refused);
        }
        check("AWS_SECRET_ACCESS_KEY", NameClass::OnlyByLease);
        for name in ["LD_PRELOAD", "LD_LIBRARY_PATH", "GLIBC_TUNABLES"] {
            check(name, NameClass::Loader);
        }
        for name in [
            "GIT_SSL_NO_VERIFY",
            "GIT_CONFIG_COUNT",
            "GIT_ASKPASS",
            "http_proxy",
            "HTTP_PROXY",
            "Https_Proxy",
            "ALL_PROXY",
            "no_proxy",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
            "CURL_CA_BUNDLE",
            "REQUESTS_CA_BUNDLE",
            "NODE_EXTRA_CA_CERTS",
            "SSLKEYLOGFILE",
        ] {
            check(name, NameClass::Git);
        }
        for name in ["HOME", "PATH"] {
            check(name, NameClass::OfProfile);
        }
        for name in [
            "LANG",
            "GITHUB_TOKEN",
            "GIT",
            "AZURE_REGION",
            "AWS_REGION",
            "AWS_ACCESS_KEY_ID",
            "LDFLAGS",
            "SUBLET",
            "HTTP_PROXY_X",
            "home",
        ] {
            check(name, NameClass::Free);
        }
    }
}
