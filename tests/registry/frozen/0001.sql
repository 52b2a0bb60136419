BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE base (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	source TEXT NOT NULL, 
	layout TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	added_at TEXT NOT NULL, 
	CONSTRAINT pk_base PRIMARY KEY (id), 
	CONSTRAINT uq_base_name UNIQUE (name)
);
INSERT INTO "base" VALUES(1,'small','/models/small','sd1','ffffffff','2026-11-22T10:18:08.256681+00:00');
INSERT INTO "base" VALUES(2,'large','/models/large','sdxl','eeeeeeee','2026-11-22T10:18:08.343237+00:00');
CREATE TABLE concept (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	definition TEXT NOT NULL, 
	added_at TEXT NOT NULL, 
	CONSTRAINT pk_concept PRIMARY KEY (id), 
	CONSTRAINT uq_concept_name UNIQUE (name)
);
INSERT INTO "concept" VALUES(1,'apple','object','{"anchor": "pear", "kind": "object", "name": "apple", "synonyms": []}','2026-11-22T10:18:08.306220+00:00');
INSERT INTO "concept" VALUES(2,'Äpfel & ''Birnen''','style','{"anchor": "\u4e00\u679a\u306e\u7d75", "kind": "style", "name": "\u00c4pfel & ''Birnen''", "synonyms": ["Pomologie", "fruit; still life"]}','2026-11-22T10:18:08.370781+00:00');
CREATE TABLE history (
	id INTEGER NOT NULL, 
	recipe_id INTEGER NOT NULL, 
	revision INTEGER NOT NULL, 
	action TEXT NOT NULL, 
	patch_id TEXT NOT NULL, 
	strength_before DOUBLE, 
	strength_after DOUBLE, 
	why TEXT NOT NULL, 
	who TEXT NOT NULL, 
	at TEXT NOT NULL, 
	digest_before TEXT, 
	digest_after TEXT, 
	CONSTRAINT pk_history PRIMARY KEY (id), 
	CONSTRAINT uq_history_recipe_id_revision UNIQUE (recipe_id, revision), 
	CONSTRAINT ck_history_action CHECK (action IN ('add', 'remove', 'strength')), 
	CONSTRAINT fk_history_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id), 
	CONSTRAINT fk_history_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
INSERT INTO "history" VALUES(1,1,1,'add','7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',NULL,1.0,'Übung: one
in two lines','tester','2026-11-22T10:18:09.042464+00:00',NULL,NULL);
INSERT INTO "history" VALUES(2,1,2,'add','3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',NULL,0.5,'Übung: two
in two lines','tester','2026-11-22T10:18:09.152914+00:00',NULL,NULL);
INSERT INTO "history" VALUES(3,1,3,'strength','7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',1.0,2.0,'Übung: one
in two lines','tester','2026-11-22T10:18:09.212936+00:00',NULL,NULL);
INSERT INTO "history" VALUES(4,1,4,'remove','7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',2.0,NULL,'Übung: one
in two lines','tester','2026-11-22T10:18:09.301919+00:00',NULL,NULL);
INSERT INTO "history" VALUES(5,1,5,'add','8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',NULL,1.0,'Übung: three
in two lines','tester','2026-11-22T10:18:09.316856+00:00',NULL,NULL);
CREATE TABLE patch (
	id TEXT NOT NULL, 
	concept_id INTEGER NOT NULL, 
	base_id INTEGER NOT NULL, 
	solver TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	settings TEXT NOT NULL, 
	seed BIGINT NOT NULL, 
	nbytes BIGINT NOT NULL, 
	blob TEXT NOT NULL, 
	seconds DOUBLE NOT NULL, 
	solved_at TEXT NOT NULL, 
	CONSTRAINT pk_patch PRIMARY KEY (id), 
	CONSTRAINT fk_patch_concept_id_concept FOREIGN KEY(concept_id) REFERENCES concept (id), 
	CONSTRAINT fk_patch_base_id_base FOREIGN KEY(base_id) REFERENCES base (id)
);
INSERT INTO "patch" VALUES('7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',1,1,'uce','text map','{"lambda": 0.1}',7,3,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',0.5,'2026-11-22T10:18:08.605214+00:00');
INSERT INTO "patch" VALUES('3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',2,1,'uce','text map','{"lambda": 0.1}',7,3,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',0.5,'2026-11-22T10:18:08.745666+00:00');
INSERT INTO "patch" VALUES('8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',1,1,'uce','text map','{"lambda": 0.1}',7,5,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',0.5,'2026-11-22T10:18:08.839692+00:00');
CREATE TABLE recipe (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	base_id INTEGER NOT NULL, 
	created_at TEXT NOT NULL, 
	CONSTRAINT pk_recipe PRIMARY KEY (id), 
	CONSTRAINT uq_recipe_name UNIQUE (name), 
	CONSTRAINT fk_recipe_base_id_base FOREIGN KEY(base_id) REFERENCES base (id)
);
INSERT INTO "recipe" VALUES(1,'safe',1,'2026-11-22T10:18:08.885220+00:00');
INSERT INTO "recipe" VALUES(2,'empty',2,'2026-11-22T10:18:08.932616+00:00');
CREATE TABLE recipe_patch (
	recipe_id INTEGER NOT NULL, 
	patch_id TEXT NOT NULL, 
	strength DOUBLE NOT NULL, 
	CONSTRAINT pk_recipe_patch PRIMARY KEY (recipe_id, patch_id), 
	CONSTRAINT fk_recipe_patch_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id), 
	CONSTRAINT fk_recipe_patch_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
INSERT INTO "recipe_patch" VALUES(1,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',0.5);
INSERT INTO "recipe_patch" VALUES(1,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',1.0);
CREATE INDEX ix_patch_concept_id ON patch (concept_id);
CREATE INDEX ix_patch_base_id ON patch (base_id);
CREATE INDEX ix_recipe_patch_patch_id ON recipe_patch (patch_id);
CREATE INDEX ix_history_patch_id ON history (patch_id);
COMMIT;
