//! `aws-sts` against moto in server mode, with the real `aws` and boto3 as the leased command.
#![forbid(unsafe_code)]

mod support;

use std::process::Command;

use serde_json::Value;
use support::World;
use support::servers::{self, Server};

const POLICY: &str = r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::{bucket}/*"}]}"#;

fn moto() -> Server {
    let python = servers::python();
    Server::on_a_free_port(|port| {
        let mut command = Command::new(python.with_file_name("moto_server"));
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        command
    })
}

struct Scene {
    world: World,
    moto: Server,
    profile: String,
    bin: String,
}

fn scene(by: &str) -> Scene {
    let world = World::host();
    let moto = moto();
    let bin = servers::python().parent().unwrap().display().to_string();
    world.configure(&format!(
        "[secrets.key]\nsource = \"vault\"\nallow = []\n\
         [secrets.deploy]\nsource = \"aws-sts\"\nregion = \"eu-west-1\"\nendpoint = \"{}\"\n\
         role_arn = \"arn:aws:iam::123456789012:role/deploy\"\n{by} = \"key\"\n\
         policy = '''{POLICY}'''\nallow = [\"deploy.read@s3.test\"]\n",
        moto.url("/"),
    ));
    let key = match by {
        "access_key" => {
            r#"{"AccessKeyId":"AKIAIOSFODNN7EXAMPLE","SecretAccessKey":"base-secret-key-0123456789"}"#
        }
        _ => "header.payload.signature",
    };
    world.set_secret("key", key.as_bytes());
    let root = std::path::Path::new(&bin).parent().unwrap().display().to_string();
    let profile = world.profile(
        "aws",
        &format!(
            "extends = \"default\"\n[filesystem]\nread_only = [\"/usr\", \"/bin\", \"/lib\", \"/lib64\", \"/etc/ssl\", \"{root}\"]\n\
             [network]\nmode = \"host\"\n[environment]\nset = {{ AWS_ENDPOINT_URL = \"{}\", AWS_DEFAULT_REGION = \"eu-west-1\", AWS_EC2_METADATA_DISABLED = \"true\", LANG = \"C.UTF-8\" }}\n\
             [[capability]]\nname = \"deploy.read\"\nchannels = [\"env\", \"file\"]\ncommand = [[\"**\"]]\nconstraints = {{ bucket = \"insights\" }}\n\
             [[capability.audience]]\nhost = \"s3.test\"\nsecret = \"deploy\"\nvariable = \"AWS\"\nformat = \"aws\"\n",
            moto.url(""),
        ),
    );
    Scene { world, moto, profile, bin }
}

impl Scene {
    fn sh(&self, channel: &str, script: &str) -> support::Outcome {
        let lease = format!("--lease=deploy.read@s3.test,channel={channel}");
        self.world.run(&["--profile", &self.profile, &lease, "--", "sh", "-c", script])
    }
}

#[test]
fn the_real_clients_use_a_session_whose_name_is_the_lease() {
    let scene = scene("access_key");
    let bin = &scene.bin;
    // As environment, by the aws command.
    let outcome = scene.sh("env", &format!("{bin}/aws sts get-caller-identity --output json")).ok();
    let lease = outcome.report()["leases"][0]["lease_id"].as_str().unwrap().to_owned();
    let arn = outcome.json()["Arn"].as_str().unwrap().to_owned();
    assert_eq!(arn, format!("arn:aws:sts::123456789012:assumed-role/deploy/{lease}"));

    // As environment, by boto3; and each part of it is masked.
    let python = "import boto3, os; print(boto3.client(\"sts\").get_caller_identity()[\"Arn\"]); \
        print(os.environ[\"AWS_SECRET_ACCESS_KEY\"]); print(os.environ[\"AWS_SESSION_TOKEN\"])";
    let outcome = scene.sh("env", &format!("{bin}/python -c '{python}'")).ok();
    let lines: Vec<String> = outcome.out().lines().map(str::to_owned).collect();
    assert!(lines[0].contains("assumed-role/deploy/lse_"), "{outcome}");
    assert!(lines[1..].iter().all(|line| line == "***"), "{outcome}");

    // As the file that a credential_process prints.
    let script = format!(
        "printf '[default]\\ncredential_process = /bin/cat /run/sublet/secrets/AWS\\n' > /tmp/config; \
         AWS_CONFIG_FILE=/tmp/config {bin}/aws sts get-caller-identity --query Arn --output text"
    );
    scene.sh("file", &script).ok().says("assumed-role/deploy/lse_");

    let trail = scene.world.trail();
    let issued: Vec<&Value> = trail.iter().filter(|e| e["type"] == "mint.issued").collect();
    assert_eq!(issued.len(), 3);
    let scope = issued[0]["detail"]["scope"].as_str().unwrap();
    assert!(scope.contains("arn:aws:s3:::insights/*"), "narrowed to the capability: {scope}");
    assert_eq!(issued[0]["detail"]["issued_to"], arn.as_str());
    scene.world.holds_nowhere(b"base-secret-key-0123456789");
}

#[test]
fn a_web_identity_token_assumes_the_role() {
    let scene = scene("web_identity_token");
    let bin = &scene.bin;
    let outcome = scene.sh("env", &format!("{bin}/aws sts get-caller-identity --output json")).ok();
    assert!(outcome.json()["Arn"].as_str().unwrap().contains("assumed-role/deploy/lse_"));
}

#[test]
fn no_sts_no_session() {
    let mut scene = scene("access_key");
    scene.world.set_secret("key", b"{\"AccessKeyId\":\"AK\"}");
    let outcome = scene.sh("env", "echo it ran").denied("source_unavailable");
    assert!(outcome.err().contains("not of the form it must have"), "{outcome}");
    let replacement = moto();
    scene.moto = replacement;
    scene.world.set_secret("key", br#"{"AccessKeyId":"AK","SecretAccessKey":"secret-0123456789"}"#);
    let outcome = scene.sh("env", "echo it ran").denied("source_unavailable");
    assert!(outcome.err().contains("no connection could be made"), "{outcome}");
}
