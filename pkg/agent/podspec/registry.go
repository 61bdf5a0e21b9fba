package podspec

import (
	"path"
	"strings"
)

const dockerHub = "index.docker.io"

// RegistryMatch says how well credentials for place (a registry, perhaps with
// a path, as docker's configuration file has them) fit an image: the length of
// the path they share, or -1.
func RegistryMatch(place, image string) int {
	host, rest := splitImage(image)
	place = strings.TrimPrefix(strings.TrimPrefix(place, "https://"), "http://")
	place = strings.TrimSuffix(place, "/")
	for _, v := range []string{"/v1", "/v2"} {
		place = strings.TrimSuffix(place, v)
	}
	wantHost, wantPath, _ := strings.Cut(place, "/")
	if wantHost == "docker.io" || wantHost == "registry-1.docker.io" {
		wantHost = dockerHub
	}
	if ok, err := path.Match(wantHost, host); err != nil || !ok {
		return -1
	}
	if wantPath == "" {
		return 0
	}
	if rest != wantPath && !strings.HasPrefix(rest, wantPath+"/") {
		return -1
	}
	return len(wantPath)
}

// splitImage returns the registry and the repository of an image's name.
func splitImage(image string) (host, repository string) {
	image, _, _ = strings.Cut(image, "@")
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		image = image[:i]
	}
	host, rest, ok := strings.Cut(image, "/")
	if !ok || !strings.ContainsAny(host, ".:") && host != "localhost" {
		if !ok {
			image = "library/" + image
		}
		return dockerHub, image
	}
	if host == "docker.io" {
		host = dockerHub
	}
	return host, rest
}
