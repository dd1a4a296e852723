#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| sublet_fuzz::run("oci", input));
