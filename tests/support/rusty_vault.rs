//! A real `rusty_vault` of a test's own, over TLS on loopback: AppRole, and KV v1 at `secret/`. Built from
//! crates.io once, as long as it takes and no optimised: below `target/`, like what comes from PyPI and npm.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use super::host::eventually;
use super::servers::{Server, made, run, target};
use super::world::finish;

const VERSION: &str = "0.2.1";

/// The server's program.
fn binary() -> PathBuf {
    super::needs("pkg-config", "pkg-config");
    let directory = target().join("test-rusty-vault");
    made(&directory, VERSION, || {
        let mut pkg_config = Command::new("pkg-config");
        let found = pkg_config.args(["--exists", "openssl"]).status().unwrap();
        assert!(found.success(), "this test needs OpenSSL's headers: apt-get install libssl-dev");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut install = Command::new(cargo);
        install.args(["install", "rusty_vault", "--version", VERSION, "--locked", "--debug"]);
        install.arg("--root").arg(&directory).arg("--target-dir").arg(directory.join("build"));
        // A test's server: how soon it is there counts, not how fast it is.
        install.env("CARGO_PROFILE_DEV_DEBUG", "0").env("CARGO_PROFILE_DEV_INCREMENTAL", "false");
        install.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
        run(&mut install);
        fs::remove_dir_all(directory.join("build")).unwrap();
    });
    directory.join("bin/rvault")
}

pub struct RustyVault {
    server: Server,
    dir: tempfile::TempDir,
    unseal_key: String,
    root_token: String,
}

impl RustyVault {
    /// Initialised and unsealed; with a role `builder` for AppRole logins, whose tokens live for ten minutes.
    pub fn start() -> Self {
        super::needs("curl", "curl");
        super::needs("openssl", "openssl");
        let binary = binary();
        let dir = tempfile::Builder::new().prefix("sublet-test-rv-").tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut make = Command::new("openssl");
        make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
        make.args(["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]);
        make.args(["-addext", "subjectAltName=IP:127.0.0.1"]);
        make.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
        make.arg("-keyout").arg(path("tls.key")).arg("-out").arg(path("tls.crt"));
        run(&mut make);
        let server = Server::on_a_free_port(|port| {
            let config = json!({
                "storage": {"file": {"path": path("data")}},
                "listener": {"tcp": {
                    "address": format!("127.0.0.1:{port}"), "tls_disable": false,
                    "tls_cert_file": path("tls.crt"), "tls_key_file": path("tls.key"),
                }},
                "work_dir": dir.path(), "log_level": "off",
            });
            fs::write(path("config.json"), config.to_string()).unwrap();
            let mut command = Command::new(binary);
            command.arg("server").arg("--config").arg(path("config.json"));
            command
        });
        let mut vault = Self { server, dir, unseal_key: String::new(), root_token: String::new() };
        let shares = json!({"secret_shares": 1, "secret_threshold": 1});
        let made = vault.call("PUT", "sys/init", Some(shares));
        vault.unseal_key = made["keys"][0].as_str().unwrap().to_owned();
        vault.root_token = made["root_token"].as_str().unwrap().to_owned();
        vault.unseal();
        vault.call("POST", "sys/auth/approle", Some(json!({"type": "approle"})));
        vault.call("POST", "auth/approle/role/builder", Some(json!({"token_ttl": "10m"})));
        vault
    }

    pub fn unseal(&self) {
        let key = json!({"key": self.unseal_key});
        assert_eq!(self.call("PUT", "sys/unseal", Some(key))["sealed"], false);
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.server.port)
    }

    pub fn certificate(&self) -> PathBuf {
        self.dir.path().join("tls.crt")
    }

    /// As root, who may do anything.
    #[track_caller]
    pub fn call(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail-with-body", "-X", method, "--cacert"]).arg(self.certificate());
        curl.args(["-H", &format!("X-Vault-Token: {}", self.root_token)]);
        if body.is_some() {
            curl.args(["-H", "Content-Type: application/json", "--data-binary", "@-"]);
        }
        curl.arg(format!("{}/v1/{path}", self.url()));
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let out = finish(curl, body.as_bytes(), None).ok().out();
        // Some of its answers have no body.
        serde_json::from_str(&out).unwrap_or(Value::Null)
    }

    pub fn role_id(&self) -> String {
        let told = self.call("GET", "auth/approle/role/builder/role-id", None);
        told["data"]["role_id"].as_str().unwrap().to_owned()
    }

    /// One that is good for so many logins; 0: for any number.
    pub fn secret_id(&self, uses: u32) -> String {
        let role = json!({"token_ttl": "10m", "secret_id_num_uses": uses});
        self.call("POST", "auth/approle/role/builder", Some(role));
        let told = self.call("POST", "auth/approle/role/builder/secret-id", Some(json!({})));
        told["data"]["secret_id"].as_str().unwrap().to_owned()
    }

    /// A login of the test's own, whose token nobody ends.
    pub fn log_in(&self) {
        let who = json!({"role_id": self.role_id(), "secret_id": self.secret_id(0)});
        let told = self.call("POST", "auth/approle/login", Some(who));
        assert!(told["auth"]["client_token"].is_string(), "{told}");
    }

    /// How many tokens there are, by what it keeps of each in its storage.
    pub fn tokens(&self) -> usize {
        let directory = self.dir.path().join("data/sys/token/id");
        eventually("it has kept a token", || directory.is_dir());
        fs::read_dir(directory).unwrap().count()
    }
}
